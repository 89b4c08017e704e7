#include "model/activation.h"

#include <charconv>
#include <cmath>

namespace coreinfer {
namespace {

constexpr char kFatRelu[] = "fatrelu:";

struct Named {
  const char* name;
  Activation activation;
};
// The first name of each is the one that messages use.
constexpr Named kNamed[] = {
    {"silu", {Activation::kSilu}},         {"gelu_tanh", {Activation::kGeluTanh}},
    {"relu", {Activation::kRelu}},         {"drelu", {Activation::kRelu, 0.0f, true}},
    {"swish", {Activation::kSilu}},        {"gelu_pytorch_tanh", {Activation::kGeluTanh}},
    {"gelu_new", {Activation::kGeluTanh}},
};

}  // namespace

std::optional<Activation> activation_named(const std::string& text) {
  for (const Named& named : kNamed) {
    if (text == named.name) return named.activation;
  }
  if (text.starts_with(kFatRelu)) {
    const char* const end = text.data() + text.size();
    float threshold = 0.0f;
    const auto read = std::from_chars(text.data() + sizeof(kFatRelu) - 1, end, threshold);
    if (read.ec == std::errc() && read.ptr == end && std::isfinite(threshold) && threshold >= 0) {
      return Activation{Activation::kRelu, threshold};
    }
  }
  return std::nullopt;
}

std::string activation_name(const Activation& a) {
  if (a.kind == Activation::kRelu && a.threshold != 0.0f) {
    char digits[32];
    const auto written = std::to_chars(digits, digits + sizeof(digits), a.threshold);
    return std::string(kFatRelu).append(digits, written.ptr);
  }
  for (const Named& named : kNamed) {
    if (named.activation.kind == a.kind && named.activation.both == a.both) return named.name;
  }
  return "";
}

std::optional<Activation> activation_for(const std::string& text, bool gated,
                                         std::string* expected) {
  const std::optional<Activation> activation = activation_named(text);
  if (activation && (gated || !activation->both)) return activation;
  *expected = "silu, gelu_tanh, relu, drelu, fatrelu:THRESHOLD";
  if (activation) *expected += ", and drelu only where there is a gate";
  return std::nullopt;
}

}  // namespace coreinfer
