#include "bench/columns.h"

#include <cmath>
#include <cstdint>

#include "base/error.h"
#include "bench/host.h"

namespace coreinfer::bench {
namespace {

using Value = std::optional<std::string>;

// A column of the values that `get` reads from a row: numbers, or optional ones.
template <typename Get>
Column integer(const char* name, Get get) {
  return {name, ColumnType::kInt, [get](const Row& row) -> Value {
            const std::optional<int64_t> v = get(row);
            return v ? Value(std::to_string(*v)) : std::nullopt;
          }};
}
template <typename Get>
Column number(const char* name, Get get) {
  return {name, ColumnType::kFloat, [get](const Row& row) -> Value {
            const std::optional<double> v = get(row);
            return v ? Value(format_string("%f", *v)) : std::nullopt;
          }};
}
template <typename Get>
Column words(const char* name, Get get) {
  return {name, ColumnType::kText, [get](const Row& row) -> Value { return get(row); }};
}
Column fixed(const char* name, ColumnType type, const char* value) {
  return {name, type, [value](const Row&) -> Value { return value; }};
}

template <typename T>
std::optional<T> if_core(const Row& row, const T& value) {
  return row.setting.on ? std::optional<T>(value) : std::nullopt;
}

template <typename T>
std::optional<T> if_exact(const Row& row, T value) {
  return row.setting.exact ? std::optional<T>(value) : std::nullopt;
}

std::string core_mode(const CoreSetting& setting) {
  if (!setting.on) return "off";
  return setting.exact ? "exact" : "stable";
}
template <typename T>
std::optional<T> if_measured(const Row& row, const T& value) {
  return row.bandwidth.gb_per_s > 0.0 ? std::optional<T>(value) : std::nullopt;
}
bool uses_alpha(const Row& row) {
  return row.setting.on && row.setting.spec.statistic != Statistic::kFlock;
}
std::string hex(uint64_t v) { return format_string("%016llx", static_cast<unsigned long long>(v)); }

// Core rows have a name of their own, or a tool that knows llama-bench's columns only would take
// the mean of a dense and a core row.
std::string model_type(const Row& row) {
  return row.setting.on ? row.model.type + " core " + row.setting.name() : row.model.type;
}

// A setting of llama-bench that does not exist here has its default value, by which tools join
// rows of both.
std::vector<Column> llama_bench_columns() {
  return {
      words("build_commit", [](const Row&) { return std::string(build_info().commit); }),
      integer("build_number", [](const Row&) { return build_info().number; }),
      words("cpu_info", [](const Row& r) { return r.cpu; }),
      words("gpu_info", [](const Row& r) { return r.gpu; }),
      words("backends", [](const Row& r) { return r.backend; }),
      words("model_filename", [](const Row& r) { return r.model.path; }),
      words("model_type", model_type),
      integer("model_size", [](const Row& r) { return r.model.bytes; }),
      integer("model_n_params", [](const Row& r) { return r.model.n_params; }),
      integer("n_batch", [](const Row& r) { return r.group.n_batch; }),
      integer("n_ubatch", [](const Row& r) { return r.group.n_ubatch; }),
      integer("n_threads", [](const Row& r) { return r.group.n_threads; }),
      fixed("cpu_mask", ColumnType::kText, "0x0"),
      fixed("cpu_strict", ColumnType::kBool, "0"),
      fixed("poll", ColumnType::kInt, "50"),
      words("type_k", [](const Row& r) { return r.group.type_k; }),
      words("type_v", [](const Row& r) { return r.group.type_v; }),
      integer("n_gpu_layers", [](const Row& r) { return r.group.n_gpu_layers; }),
      fixed("n_cpu_moe", ColumnType::kInt, "0"),
      fixed("split_mode", ColumnType::kText, "layer"),
      integer("main_gpu", [](const Row& r) { return r.group.main_gpu; }),
      fixed("no_kv_offload", ColumnType::kBool, "0"),
      fixed("flash_attn", ColumnType::kInt, "-1"),
      fixed("devices", ColumnType::kText, "auto"),
      fixed("tensor_split", ColumnType::kText, "0.00"),
      fixed("tensor_buft_overrides", ColumnType::kText, "none"),
      fixed("load_mode", ColumnType::kText, "auto"),
      fixed("lazy_mode", ColumnType::kText, "auto"),
      fixed("embeddings", ColumnType::kBool, "0"),
      fixed("no_op_offload", ColumnType::kInt, "0"),
      fixed("no_host", ColumnType::kBool, "0"),
      fixed("repack", ColumnType::kBool, "1"),
      fixed("fit_target", ColumnType::kInt, "0"),
      fixed("fit_min_ctx", ColumnType::kInt, "0"),
      integer("n_prompt", [](const Row& r) { return r.group.test.n_prompt; }),
      integer("n_gen", [](const Row& r) { return r.group.test.n_gen; }),
      integer("n_depth", [](const Row& r) { return r.group.test.n_depth; }),
      words("test_time", [](const Row& r) { return r.test_time; }),
      integer("avg_ns", [](const Row& r) { return std::llround(r.avg_ns()); }),
      integer("stddev_ns", [](const Row& r) { return std::llround(r.stddev_ns()); }),
      number("avg_ts", [](const Row& r) { return r.avg_ts(); }),
      number("stddev_ts", [](const Row& r) { return r.stddev_ts(); }),
  };
}

std::vector<Column> own_columns() {
  return {
      words("test", [](const Row& r) { return r.group.test.name(); }),
      words("isa", [](const Row& r) { return r.isa; }),
      words("activation", [](const Row& r) { return r.model.activation; }),
      words("core", [](const Row& r) { return core_mode(r.setting); }),
      words("statistic",
            [](const Row& r) {
              return if_core(r, std::string(statistic_name(r.setting.spec.statistic)));
            }),
      number("alpha",
             [](const Row& r) {
               return uses_alpha(r) ? std::optional<double>(r.setting.spec.alpha) : std::nullopt;
             }),
      integer("weighted",
              [](const Row& r) { return if_core(r, int64_t{r.setting.spec.weighted}); }),
      number("beta", [](const Row& r) { return if_core(r, r.setting.beta); }),
      integer("layer_first", [](const Row& r) { return if_core(r, r.layers.first); }),
      integer("layer_last", [](const Row& r) { return if_core(r, r.layers.last); }),
      number("ffn_kept_frac", [](const Row& r) { return r.ffn_kept_frac; }),
      integer("n_prompt_select", [](const Row& r) { return r.n_prompt_select; }),
      integer("count_ns", [](const Row& r) { return r.count_ns; }),
      integer("select_ns", [](const Row& r) { return r.select_ns; }),
      integer("compact_ns", [](const Row& r) { return r.compact_ns; }),
      number("choice_over_read_bw", [](const Row& r) { return r.choice_over_bandwidth(); }),
      integer("patch_rank", [](const Row& r) { return if_core(r, r.setting.patch); }),
      integer("patch_ns", [](const Row& r) { return r.patch_ns; }),
      integer("patch_bytes", [](const Row& r) { return r.patch_bytes; }),
      integer("n_drafts", [](const Row& r) { return if_exact(r, r.setting.drafts); }),
      number("accept", [](const Row& r) { return if_exact(r, r.setting.accept); }),
      number("acceptance", [](const Row& r) { return r.acceptance; }),
      integer("compact_bytes", [](const Row& r) { return r.compact_bytes; }),
      integer("compact_source_bytes", [](const Row& r) { return r.compact_source_bytes; }),
      integer("weight_bytes_per_token", [](const Row& r) { return r.weight_bytes; }),
      integer("kv_bytes_per_token", [](const Row& r) { return r.kv_read_bytes; }),
      number("eff_bw_gbs", [](const Row& r) { return r.eff_gb_per_s(); }),
      number("read_bw_gbs", [](const Row& r) { return if_measured(r, r.bandwidth.gb_per_s); }),
      integer("read_bw_bytes", [](const Row& r) { return if_measured(r, r.bandwidth.bytes); }),
      number("read_bw_share", [](const Row& r) { return r.bandwidth_share(); }),
      integer("ttft_ns", [](const Row& r) { return r.ttft_ns; }),
      number("break_even_tokens", [](const Row& r) { return r.break_even_tokens(); }),
      number("verify_over_decode", [](const Row& r) { return r.verify_over_decode; }),
      integer("kv_bytes", [](const Row& r) { return r.kv_bytes; }),
      integer("load_ns", [](const Row& r) { return r.load_ns; }),
      integer("memory_limit", [](const Row& r) { return r.memory_limit; }),
      integer("rss", [](const Row& r) { return r.rss; }),
      integer("peak_rss", [](const Row& r) { return r.peak_rss; }),
      words("logits_hash", [](const Row& r) { return hex(r.logits_hash); }),
  };
}

}  // namespace

const std::vector<Column>& columns() {
  static const std::vector<Column> all = [] {
    std::vector<Column> list = llama_bench_columns();
    for (Column& column : own_columns()) list.push_back(std::move(column));
    return list;
  }();
  return all;
}

}  // namespace coreinfer::bench
