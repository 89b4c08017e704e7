#include "bench/row.h"

#include <cmath>
#include <numeric>

namespace coreinfer::bench {
namespace {

template <typename T>
double mean(const std::vector<T>& values) {
  if (values.empty()) return 0.0;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Of a sample (n - 1); 0 for a single value.
template <typename T>
double deviation(const std::vector<T>& values) {
  if (values.size() < 2) return 0.0;
  const double center = mean(values);
  double sum = 0.0;
  for (const T v : values)
    sum += (static_cast<double>(v) - center) * (static_cast<double>(v) - center);
  return std::sqrt(sum / static_cast<double>(values.size() - 1));
}

}  // namespace

double Row::avg_ns() const { return mean(samples_ns); }
double Row::stddev_ns() const { return deviation(samples_ns); }

std::vector<double> Row::samples_ts() const {
  const auto n_tokens = static_cast<double>(group.test.n_prompt + group.test.n_gen);
  std::vector<double> ts;
  for (const int64_t ns : samples_ns) ts.push_back(n_tokens * 1e9 / static_cast<double>(ns));
  return ts;
}

double Row::avg_ts() const { return mean(samples_ts()); }
double Row::stddev_ts() const { return deviation(samples_ts()); }

std::optional<int64_t> Row::step_bytes() const {
  if (!weight_bytes) return std::nullopt;
  return *weight_bytes + kv_read_bytes.value_or(0);
}

std::optional<double> Row::eff_gb_per_s() const {
  const TestKind kind = group.test.kind;
  if (!weight_bytes || kind == TestKind::kPrompt || kind == TestKind::kPromptGenerate) {
    return std::nullopt;  // not decoding alone
  }
  // A verification reads the weights once for all of its tokens.
  const double steps = kind == TestKind::kVerify ? 1.0 : static_cast<double>(group.test.n_gen);
  return static_cast<double>(*step_bytes()) * steps / avg_ns();
}

std::optional<double> Row::bandwidth_share() const {
  const std::optional<double> used = eff_gb_per_s();
  if (!used || bandwidth.gb_per_s <= 0.0) return std::nullopt;
  return *used / bandwidth.gb_per_s;
}

std::optional<double> Row::choice_over_bandwidth() const {
  if (!compact_bytes || !select_ns || !compact_ns || bandwidth.gb_per_s <= 0.0) return std::nullopt;
  if (memory_limit) return std::nullopt;  // some of it was done during the prefill
  const auto bytes = static_cast<double>(*compact_bytes + compact_source_bytes.value_or(0));
  return static_cast<double>(*select_ns + *compact_ns) * bandwidth.gb_per_s / bytes;
}

std::optional<double> Row::break_even_tokens() const {
  if (group.test.kind != TestKind::kGenerate || !setting.on || !dense_step_ns) return std::nullopt;
  if (setting.exact) return std::nullopt;  // its steps have chosen and compacted themselves
  const double saved = *dense_step_ns - avg_ns() / static_cast<double>(group.test.n_gen);
  if (saved <= 0.0) return std::nullopt;
  return static_cast<double>(select_ns.value_or(0) + compact_ns.value_or(0) +
                             patch_ns.value_or(0)) /
         saved;
}

}  // namespace coreinfer::bench
