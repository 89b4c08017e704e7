// The Markdown table: llama-bench's columns and widths, settings only where they are not the
// default or more than one is run, then ours. Numbers are for people; the other formats have all.
#include <algorithm>
#include <functional>

#include "base/error.h"
#include "bench/host.h"
#include "bench/params.h"
#include "bench/printers.h"

namespace coreinfer::bench {
namespace {

struct Field {
  std::string title;
  int width;  // characters; negative: aligned left
  std::function<std::string(const Row&)> value;
};

std::string scaled(const std::optional<double>& v, int decimals, double scale) {
  return v ? format_string("%.*f", decimals, *v * scale) : "-";
}

std::string size_text(uint64_t bytes) {
  const auto n = static_cast<double>(bytes);
  return n < 1024.0 * 1024.0 * 1024.0 ? format_string("%.2f MiB", n / 1024 / 1024)
                                      : format_string("%.2f GiB", n / 1024 / 1024 / 1024);
}

std::string params_text(uint64_t n_params) {
  const auto n = static_cast<double>(n_params);
  return n < 1e9 ? format_string("%.2f M", n * 1e-6) : format_string("%.2f B", n * 1e-9);
}

class MarkdownPrinter final : public Printer {
 public:
  MarkdownPrinter(std::FILE* out, const std::vector<Group>& plan) : Printer(out) {
    add("model", -30, [](const Row& r) { return r.model.type; });
    add("size", 10, [](const Row& r) { return size_text(r.model.bytes); });
    add("params", 10, [](const Row& r) { return params_text(r.model.n_params); });
    add("backend", -10, [](const Row& r) { return r.backend; });
    add("threads", 7, [](const Row& r) { return std::to_string(r.group.n_threads); });
    const BenchParams defaults;
    setting(plan, "ngl", 3, &Group::n_gpu_layers, defaults.n_gpu_layers[0]);
    setting(plan, "main_gpu", 8, &Group::main_gpu, defaults.main_gpu[0]);
    setting(plan, "n_batch", 7, &Group::n_batch, defaults.n_batch[0]);
    setting(plan, "n_ubatch", 8, &Group::n_ubatch, defaults.n_ubatch[0]);
    setting(plan, "type_k", 6, &Group::type_k, defaults.type_k[0]);
    setting(plan, "type_v", 6, &Group::type_v, defaults.type_v[0]);
    add("test", 15, [](const Row& r) { return r.group.test.name(); });
    add("t/s", 20,
        [](const Row& r) { return format_string("%.2f ± %.2f", r.avg_ts(), r.stddev_ts()); });
    const bool core = plan[0].settings.size() > 1;
    if (core) {
      size_t width = 10;
      for (const CoreSetting& c : plan[0].settings) width = std::max(width, c.name().size());
      add("core", -static_cast<int>(width), [](const Row& r) { return r.setting.name(); });
      add("kept", 5, [](const Row& r) { return scaled(r.ffn_kept_frac, 3, 1.0); });
    }
    add("MiB/step", 8, [](const Row& r) { return scaled(r.step_bytes(), 1, 1.0 / (1 << 20)); });
    add("GB/s", 6, [](const Row& r) { return scaled(r.eff_gb_per_s(), 2, 1.0); });
    add("of bw", 5, [](const Row& r) { return scaled(r.bandwidth_share(), 2, 1.0); });
    add("ttft ms", 9, [](const Row& r) { return scaled(r.ttft_ns, 1, 1e-6); });
    if (core) {
      add("count ms", 8, [](const Row& r) { return scaled(r.count_ns, 2, 1e-6); });
      add("select ms", 9, [](const Row& r) { return scaled(r.select_ns, 2, 1e-6); });
      add("compact ms", 10, [](const Row& r) { return scaled(r.compact_ns, 2, 1e-6); });
      const auto patched = [](const CoreSetting& c) { return c.patch > 0; };
      const std::vector<CoreSetting>& all = plan[0].settings;
      if (std::any_of(all.begin(), all.end(), patched)) {
        add("patch ms", 8, [](const Row& r) { return scaled(r.patch_ns, 2, 1e-6); });
      }
      const auto drafts = [](const CoreSetting& c) { return c.exact; };
      if (std::any_of(all.begin(), all.end(), drafts)) {
        add("accepted", 8, [](const Row& r) { return scaled(r.acceptance, 2, 1.0); });
      }
      add("pays after", 10, [](const Row& r) { return scaled(r.break_even_tokens(), 1, 1.0); });
    }
    const auto verifies = [](const Group& g) { return g.test.kind == TestKind::kVerify; };
    if (std::any_of(plan.begin(), plan.end(), verifies)) {
      add("decode steps", 12, [](const Row& r) { return scaled(r.verify_over_decode, 2, 1.0); });
    }
    add("peak MiB", 8,
        [](const Row& r) { return scaled(static_cast<double>(r.peak_rss), 0, 1.0 / (1 << 20)); });
  }

  void header() override {
    std::string titles, rule;
    for (const Field& field : fields_) {
      append_cell(titles, padded(field, field.title));
      const std::string dashes(static_cast<size_t>(std::abs(field.width) - 1), '-');
      append_cell(rule, dashes + (field.width > 0 ? ":" : "-"));
    }
    put(titles + "|\n");
    put(rule + "|\n");
  }

  void row(const Row& row) override {
    std::string line;
    for (const Field& field : fields_) append_cell(line, padded(field, field.value(row)));
    put(line + "|\n");
  }

  void footer() override {
    const BuildInfo build = build_info();
    put(format_string("\nbuild: %s (%lld)\n", build.commit, static_cast<long long>(build.number)));
  }

 private:
  void add(std::string title, int width, std::function<std::string(const Row&)> value) {
    fields_.push_back({std::move(title), width, std::move(value)});
  }

  // A column for a setting that some group has at another value than the default.
  template <typename T>
  void setting(const std::vector<Group>& plan, const char* title, int width, T Group::* member,
               const T& usual) {
    const auto differs = [&](const Group& g) { return g.*member != usual; };
    if (std::none_of(plan.begin(), plan.end(), differs)) return;
    add(title, width, [member](const Row& r) { return as_text(r.group.*member); });
  }
  static void append_cell(std::string& line, const std::string& text) {
    line += "| ";
    line += text;
    line += ' ';
  }
  static std::string as_text(int64_t v) { return std::to_string(v); }
  static std::string as_text(const std::string& v) { return v; }

  // Padded by characters, not bytes: "±" is two bytes of UTF-8.
  static std::string padded(const Field& field, const std::string& text) {
    const auto starts = [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; };
    const auto length = std::count_if(text.begin(), text.end(), starts);
    const auto width = static_cast<ptrdiff_t>(std::abs(field.width));
    const std::string space(static_cast<size_t>(std::max<ptrdiff_t>(0, width - length)), ' ');
    return field.width < 0 ? text + space : space + text;
  }

  std::vector<Field> fields_;
};

}  // namespace

std::unique_ptr<Printer> make_markdown_printer(std::FILE* out, const std::vector<Group>& plan) {
  return std::make_unique<MarkdownPrinter>(out, plan);
}

}  // namespace coreinfer::bench
