// Runs a small model (tests/native/make_model.py) from the file to decoding with core neurons, with
// every instruction set that can run here. Bit for bit the same: one thread and two, and two
// engines at work side by side. The same up to rounding: each instruction set and the plain one.
// For thread sanitizer builds and for machines without Python. Exits with 1 and names what differs.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/session.h"
#include "kernels/isa.h"

using namespace coreinfer;

namespace {

int failures = 0;

void check(bool good, const std::string& isa, const char* what) {
  if (good) return;
  ++failures;
  std::printf("%s on %s\n", what, isa.c_str());
}

struct Result {
  std::vector<float> logits;  // of the prompt's last token and of each decoded one
  CoreSet core;
  bool operator==(const Result& other) const {
    return logits == other.logits && core.layers == other.core.layers;
  }
};

constexpr int kPrompt = 40, kDecoded = 4;  // a prompt above the 16 rows of the exact path

Result run(const std::string& path, int n_threads, bool f32_activations) {
  EngineOptions options;
  options.cpu = {n_threads, f32_activations};
  Session session(Engine::load(path, options), {});
  std::vector<int32_t> tokens;
  for (int i = 0; i < kPrompt + kDecoded; ++i) tokens.push_back(i * i % 251);
  Result result;
  const auto take = [&] {
    const std::span<const float> logits = session.logits();
    result.logits.insert(result.logits.end(), logits.begin(), logits.end());
  };
  session.prefill({tokens.data(), kPrompt}, StatisticSpec{});
  take();
  result.core = session.select({0.4});
  session.set_core(result.core);
  for (int i = 0; i < kDecoded; ++i) {
    session.decode(tokens[static_cast<size_t>(kPrompt + i)]);
    take();
  }
  return result;
}

// Root mean square of the differences, over the standard deviation of the second.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0.0, square = 0.0, difference = 0.0;
  for (size_t i = 0; i < b.size(); ++i) {
    sum += b[i];
    square += static_cast<double>(b[i]) * b[i];
    difference += static_cast<double>(a[i] - b[i]) * (a[i] - b[i]);
  }
  const auto n = static_cast<double>(b.size());
  return std::sqrt(difference / (square - sum * sum / n));
}

void check_isa(const std::string& path, const std::string& isa) {
  setenv("COREINFER_ISA", "scalar", 1);
  const Result plain = run(path, 1, true);
  setenv("COREINFER_ISA", isa.c_str(), 1);
  const Result exact = run(path, 1, true), fast = run(path, 1, false);
  // Float32 sums in another order. 8-bit codes of activations are half a percent off each; a wrong
  // scale or column gives a distance near 1.
  check(distance(exact.logits, plain.logits) < 1e-3, isa, "float32 activations: wrong logits");
  check(distance(fast.logits, plain.logits) < 0.2, isa, "8-bit activations: wrong logits");
  check(run(path, 2, false) == fast, isa, "two threads: other results");
  Result beside[2];
  std::thread callers[2];
  for (int i = 0; i < 2; ++i) {
    callers[i] = std::thread([&, i] { beside[i] = run(path, i + 1, false); });
  }
  for (std::thread& caller : callers) caller.join();
  check(beside[0] == fast && beside[1] == fast, isa, "two engines side by side: other results");
  std::printf("checked %s\n", isa.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::printf("usage: check_engine MODEL\n");
    return EXIT_FAILURE;
  }
  for (const Isa isa : available_isas()) check_isa(argv[1], std::string(isa_name(isa)));
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
