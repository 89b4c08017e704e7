// Sampler: logits to a token. Flows in: one row of logits and the tokens so far. Flows out: a token
// id, the same for the same seed, parameters and history on every machine. It does not know text.
//
// Order of steps, as users of llama.cpp expect: logit bias, penalties, then for temperature 0 the
// arg-max (ties to the lower id), else top-k, typical-p, top-p, min-p, temperature, draw.
#pragma once

#include <cstdint>
#include <map>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace coreinfer {

struct SamplingParams {
  float temperature = 0.8f;     // 0: greedy
  int32_t top_k = 40;           // 0 or less: all
  float top_p = 0.95f;          // 1: all
  float min_p = 0.05f;          // 0: all; share of the likeliest token's probability
  float typical_p = 1.0f;       // 1: all
  float repeat_penalty = 1.0f;  // 1: none
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
  int32_t penalty_last_n = 64;  // tokens that the penalties look back on
  std::map<int32_t, float> logit_bias;
  uint64_t seed = 0;
};
// Throws kValue naming the parameter, its range and what was found.
void check(const SamplingParams& params);

class Sampler {
 public:
  explicit Sampler(const SamplingParams& params);

  // Remembers a token for the penalties.
  void accept(int32_t token);
  // Draws a token; does not accept it.
  int32_t sample(std::span<const float> logits);
  // Takes over parameters, memory and the state of chance, so that both draw alike from now on.
  void follow(const Sampler& other);
  const SamplingParams& params() const { return params_; }

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };
  bool changes_logits() const;
  void bias_and_penalize(std::vector<float>& logits) const;
  void keep_typical(std::vector<Candidate>& candidates) const;
  void keep_top_p(std::vector<Candidate>& candidates) const;
  void keep_min_p(std::vector<Candidate>& candidates) const;

  SamplingParams params_;
  std::vector<int32_t> recent_;  // a ring of the last penalty_last_n tokens
  size_t next_ = 0;
  std::mt19937_64 random_;
  std::vector<float> adjusted_;
  std::vector<Candidate> candidates_;
};

// ln of the sum of exp(logits), computed in double.
double log_sum_exp(std::span<const float> logits);
// ln p of every id: out[i] = logits[i] - log_sum_exp(logits).
void log_softmax(std::span<const float> logits, std::span<float> out);
// The n likeliest ids, likeliest first, ties to the lower id, with their ln p.
std::vector<std::pair<int32_t, float>> top_logprobs(std::span<const float> logits, int32_t n);

}  // namespace coreinfer
