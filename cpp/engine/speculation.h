// Speculation: what exact mode remembers between tokens. Drafts are tokens that are expected to
// follow the text; one pass of the dense weights has looked at all of them, and the logits behind
// each are ready while the text takes just those tokens. It computes nothing; session_exact.cpp
// does.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/draft_pace.h"
#include "forward/transformer.h"
#include "neurons/core_set.h"
#include "sampling/sampler.h"

namespace coreinfer {

// How exact mode drafts.
struct ExactSpec {
  CoreShare share{0.4};    // of the drafting core set
  int64_t max_drafts = 8;  // in one verification
  bool core = true;        // draft with the core neurons
  bool text = true;        // draft what followed an earlier place of the same text
  bool paced = true;       // draft as many as pay; false: always max_drafts, for measurements
};
void check(const ExactSpec& spec);  // kValue naming the field, the share apart

// Rows of activations that exact mode keeps: those of a verification, and those of tokens that are
// counted together, since counting one at a time costs as many calls as layers.
inline constexpr int64_t kSeenRows = kExactRows, kKeptRows = 2 * kExactRows;
inline constexpr int64_t kExactSamples = kSeenRows + kKeptRows;

struct Speculation {
  ExactSpec spec;
  DraftPace pace;

  int64_t length(DraftPace::Source from, int64_t limit, double entry = 0.0) const {
    return spec.paced ? pace.length(from, limit, entry) : limit;
  }

  // The present drafts; those before `taken` have become text.
  std::vector<int32_t> drafts;
  DraftPace::Source source = DraftPace::kCore;
  size_t taken = 0;
  bool looked = false;  // the transformer's logits belong to the drafts

  // Activations of the present verification, if `counting`: always in one place, so that a GPU
  // finds its launches equal to those of another verification.
  KeptActivations seen;
  bool counting = false;
  KeptActivations kept;  // of tokens that are text but not counted yet: rows [0, n_kept)
  int64_t n_kept = 0;
  int64_t chosen_at = 0;  // tokens counted when the core set was chosen; 0: it is to be chosen
  std::optional<Sampler> sampler;  // that draws the drafts
};

}  // namespace coreinfer
