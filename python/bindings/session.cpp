#include "engine/session.h"

#include <nanobind/stl/function.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bindings/arrays.h"

namespace coreinfer::python {
namespace {

// float16: no C++ type of that name everywhere, so its 16 bits.
using Matrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Factors = std::vector<std::optional<std::pair<Matrix, Matrix>>>;
constexpr nb::dlpack::dtype kHalf = {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
using Neurons = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Layers = std::optional<std::pair<int64_t, int64_t>>;

std::optional<LayerRange> range_of(const Layers& layers) {
  if (!layers) return std::nullopt;
  return LayerRange{layers->first, layers->second};
}

CoreShare share_of(double beta, const Layers& layers, double first_layer) {
  return {beta, range_of(layers), first_layer};
}

std::optional<StatisticSpec> spec_of(const std::optional<std::string>& statistic, double alpha,
                                     bool weighted, int64_t samples) {
  if (!statistic) return std::nullopt;
  StatisticSpec spec{statistic_from_name(*statistic), alpha, weighted, samples};
  check(spec);
  return spec;
}

std::vector<LayerPatch> make_patch(const Factors& factors) {
  const auto halves = [](const Matrix& matrix) {
    if (matrix.dtype() != kHalf) throw nb::type_error("a patch is made of float16 matrices");
    return std::vector<uint16_t>(span_of<uint16_t>(matrix).begin(),
                                 span_of<uint16_t>(matrix).end());
  };
  std::vector<LayerPatch> patch;
  for (const auto& layer : factors) {
    patch.emplace_back();
    if (!layer) continue;
    const auto& [in, out] = *layer;
    patch.back() = {static_cast<int64_t>(in.shape(0)), halves(in), halves(out)};
  }
  return patch;
}

nb::list core_patch(const CoreSet& set) {
  const auto matrix = [](const std::vector<uint16_t>& values, size_t rows) {
    auto* const data = new uint16_t[values.size()];
    std::copy(values.begin(), values.end(), data);
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<uint16_t*>(p); });
    const size_t shape[] = {rows, values.size() / rows};
    return nb::ndarray<nb::numpy>(data, 2, shape, owner, nullptr, kHalf);
  };
  nb::list list;
  for (const LayerPatch& p : set.patch) {
    if (p.rank == 0) {
      list.append(nb::none());
    } else {
      const auto rank = static_cast<size_t>(p.rank);
      list.append(nb::make_tuple(matrix(p.in, rank), matrix(p.out, p.out.size() / rank)));
    }
  }
  return list;
}

// A prior whose numbers lie in the arrays of the given lists.
PatchPrior make_prior(const std::vector<Matrix>& h, const std::vector<Matrix>& y,
                      const std::vector<FloatVector>& weights) {
  PatchPrior prior;
  if (h.empty() || h.size() != y.size() || h.size() != weights.size()) {
    throw nb::value_error("a prior has inputs, outputs and weights of every layer");
  }
  prior.rows = static_cast<int64_t>(h[0].shape(0));
  prior.n_ff = static_cast<int64_t>(h[0].shape(1));
  prior.n_embd = static_cast<int64_t>(y[0].shape(1));
  const auto fits = [&](const Matrix& m, int64_t width) {
    return m.dtype() == kHalf && static_cast<int64_t>(m.shape(0)) == prior.rows &&
           static_cast<int64_t>(m.shape(1)) == width;
  };
  for (size_t i = 0; i < h.size(); ++i) {
    if (!fits(h[i], prior.n_ff) || !fits(y[i], prior.n_embd) ||
        static_cast<int64_t>(weights[i].size()) != prior.rows) {
      throw nb::value_error(
          "a prior is made of float16 (rows, n_ff), float16 (rows, n_embd) and float32 (rows,), "
          "the same in every layer");
    }
    prior.layers.push_back({static_cast<const uint16_t*>(h[i].data()),
                            static_cast<const uint16_t*>(y[i].data()), weights[i].data()});
  }
  return prior;
}

CoreSet make_core_set(const std::vector<std::optional<Neurons>>& layers,
                      const std::optional<std::vector<FloatVector>>& scores, int64_t n_ff,
                      const std::string& statistic, double alpha, double beta, int64_t n_tokens,
                      bool weighted, const std::optional<Factors>& patch) {
  CoreSet set;
  set.n_ff = n_ff;
  for (const std::optional<Neurons>& layer : layers) {
    set.layers.emplace_back();
    if (!layer) continue;
    const auto neurons = span_of<int32_t>(*layer);
    set.layers.back().emplace(neurons.begin(), neurons.end());
  }
  if (scores) {
    for (const FloatVector& layer : *scores) {
      const auto values = span_of<float>(layer);
      set.scores.emplace_back(values.begin(), values.end());
    }
  }
  set.statistic = statistic;
  set.alpha = alpha;
  set.beta = beta;
  set.n_tokens = n_tokens;
  set.weighted = weighted;
  if (patch) set.patch = make_patch(*patch);
  check(set, static_cast<int64_t>(set.layers.size()), n_ff);
  return set;
}

nb::list core_layers(const CoreSet& set) {
  nb::list list;
  for (const auto& layer : set.layers) {
    if (layer) {
      list.append(copy_array<int32_t>(*layer));
    } else {
      list.append(nb::none());
    }
  }
  return list;
}

nb::list core_scores(const CoreSet& set) {
  nb::list list;
  for (const std::vector<float>& scores : set.scores) list.append(copy_array<float>(scores));
  return list;
}

nb::dict timings_dict(const Session& s) {
  const Timings& t = s.timings();
  nb::dict d;
  d["load_seconds"] = s.engine().load_seconds();
  d["prefill_tokens"] = t.prefill_tokens;
  d["prefill_seconds"] = t.prefill_seconds;
  d["count_seconds"] = t.count_seconds;
  d["select_seconds"] = t.select_seconds;
  d["compact_seconds"] = t.compact_seconds;
  d["patch_seconds"] = t.patch_seconds;
  d["compact_bytes"] = s.compact_bytes();
  d["compact_source_bytes"] = s.compact_source_bytes();
  d["decode_tokens"] = t.decode_tokens;
  d["decode_bytes"] = t.decode_bytes;
  d["decode_seconds"] = t.decode_seconds;
  d["drafted_tokens"] = t.drafted_tokens;
  d["accepted_tokens"] = t.accepted_tokens;
  d["verifications"] = t.verifications;
  d["draft_seconds"] = t.draft_seconds;
  d["replay_tokens"] = t.replay_tokens;
  d["replay_seconds"] = t.replay_seconds;
  return d;
}

std::optional<nb::dict> pace_dict(const Session& s) {
  const DraftPace* pace = s.pace();
  if (pace == nullptr) return std::nullopt;
  nb::dict d;
  for (const auto source : {DraftPace::kCore, DraftPace::kText}) {
    nb::dict of;
    of["gain"] = pace->gain(source);
    of["acceptance"] = pace->acceptance(source);
    of["known"] = pace->known(source);
    d[source == DraftPace::kCore ? "core" : "text"] = of;
  }
  return d;
}

// Asked between layers: a pending Ctrl-C becomes Python's own exception, and a stop here.
bool interrupted() {
  nb::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

void prefill(Session& s, const Tokens& tokens, const std::optional<std::string>& statistic,
             double alpha, bool weighted, int64_t samples,
             const std::function<void(int64_t, int64_t)>& progress, std::optional<double> beta,
             const Layers& layers, double first_layer) {
  const auto spec = spec_of(statistic, alpha, weighted, samples);
  const auto ids = span_of<int32_t>(tokens);
  std::function<void(int64_t, int64_t)> report;
  if (progress) {
    report = [&progress](int64_t done, int64_t total) {
      nb::gil_scoped_acquire gil;
      progress(done, total);
    };
  }
  std::optional<CoreShare> expected;
  if (beta) expected = share_of(*beta, layers, first_layer);
  nb::gil_scoped_release release;
  s.prefill(ids, spec, report, interrupted, expected);
}

Array<float> rows_of(Session& s, const Tokens& tokens,
                     void (Session::*call)(std::span<const int32_t>, std::span<float>,
                                           const std::function<bool()>&)) {
  const auto ids = span_of<int32_t>(tokens);
  const auto n_vocab = static_cast<size_t>(s.engine().config().n_vocab);
  Array<float> out = make_array<float>({ids.size(), n_vocab});
  nb::gil_scoped_release release;
  (s.*call)(ids, {out.data(), ids.size() * n_vocab}, interrupted);
  return out;
}

}  // namespace

void bind_session(nb::module_& m) {
  nb::class_<PatchPrior>(m, "PatchPrior",
                         "What other texts taught of a model's FFNs; see coreinfer.patch_prior.")
      .def(
          "__init__",
          [](PatchPrior* self, const std::vector<Matrix>& h, const std::vector<Matrix>& y,
             const std::vector<FloatVector>& weights) {
            new (self) PatchPrior(make_prior(h, y, weights));
          },
          // A converted array would be gone when this returns.
          nb::arg("h").noconvert(), nb::arg("y").noconvert(), nb::arg("weights").noconvert(),
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(),
          "Per layer: float16 (rows, n_ff), float16 (rows, n_embd) and float32 (rows,). They are "
          "not copied: hand in tuples.");
  nb::class_<CoreSet>(m, "CoreSet", "Which neurons of which layers decode a text; a plain value.")
      .def(
          "__init__",
          [](CoreSet* self, const std::vector<std::optional<Neurons>>& layers,
             const std::optional<std::vector<FloatVector>>& scores, int64_t n_ff,
             const std::string& statistic, double alpha, double beta, int64_t n_tokens,
             bool weighted, const std::optional<Factors>& patch) {
            new (self) CoreSet(make_core_set(layers, scores, n_ff, statistic, alpha, beta, n_tokens,
                                             weighted, patch));
          },
          nb::arg("layers"), nb::arg("scores") = nb::none(), nb::kw_only(), nb::arg("n_ff"),
          nb::arg("statistic") = "", nb::arg("alpha") = 0.0, nb::arg("beta") = 0.0,
          nb::arg("n_tokens") = 0, nb::arg("weighted") = false, nb::arg("patch") = nb::none(),
          "layers: per layer ascending int32 indices, or None where it stays dense. patch: per "
          "layer "
          "float16 (rank, k) and (n_embd, rank), or None.")
      .def_prop_ro("layers", &core_layers, "Per layer: int32 (k,), ascending, or None (dense).")
      .def_prop_ro("scores", &core_scores, "Per layer: float32 (n_ff,); empty when handed in.")
      .def_prop_ro("patch", &core_patch,
                   "Per layer: float16 (rank, k) and (n_embd, rank), or None; empty without any.")
      .def_ro("n_ff", &CoreSet::n_ff)
      .def_ro("statistic", &CoreSet::statistic)
      .def_ro("alpha", &CoreSet::alpha)
      .def_ro("weighted", &CoreSet::weighted)
      .def_ro("beta", &CoreSet::beta)
      .def_ro("n_tokens", &CoreSet::n_tokens)
      .def("same_neurons", &CoreSet::same_neurons, nb::arg("other"));

  nb::class_<Sampler>(m, "Sampler", "Logits to a token; seeded; remembers tokens for penalties.")
      .def(
          "__init__",
          [](Sampler* self, float temperature, int32_t top_k, float top_p, float min_p,
             float typical_p, float repeat_penalty, float frequency_penalty, float presence_penalty,
             int32_t penalty_last_n, const std::map<int32_t, float>& logit_bias, uint64_t seed) {
            new (self) Sampler(SamplingParams{temperature, top_k, top_p, min_p, typical_p,
                                              repeat_penalty, frequency_penalty, presence_penalty,
                                              penalty_last_n, logit_bias, seed});
          },
          nb::kw_only(), nb::arg("temperature") = 0.8f, nb::arg("top_k") = 40,
          nb::arg("top_p") = 0.95f, nb::arg("min_p") = 0.05f, nb::arg("typical_p") = 1.0f,
          nb::arg("repeat_penalty") = 1.0f, nb::arg("frequency_penalty") = 0.0f,
          nb::arg("presence_penalty") = 0.0f, nb::arg("penalty_last_n") = 64,
          nb::arg("logit_bias") = std::map<int32_t, float>{}, nb::arg("seed") = 0)
      .def("accept", &Sampler::accept, nb::arg("token"))
      .def(
          "sample",
          [](Sampler& s, const FloatVector& logits) { return s.sample(span_of<float>(logits)); },
          nb::arg("logits").noconvert());

  m.attr("EXACT_SAMPLES") = kExactSamples;
  m.attr("PATCH_SAMPLES") = kPatchSamples;
  m.def(
      "core_sizes",
      [](double beta, int64_t n_layer, int64_t n_ff, const Layers& layers, double first_layer) {
        return core_sizes(share_of(beta, layers, first_layer), n_layer, n_ff);
      },
      nb::arg("beta"), nb::kw_only(), nb::arg("n_layer"), nb::arg("n_ff"),
      nb::arg("layers") = nb::none(), nb::arg("first_layer") = CoreShare{}.first_layer,
      "Neurons that each layer that takes part keeps: the share beta on average, in the model's "
      "first layer first_layer times as many.");

  nb::class_<Session>(m, "Session", "One text of one caller: cache, neuron scores, decode weights.")
      .def(
          "__init__",
          [](Session* self, std::shared_ptr<const Engine> engine, int64_t n_ctx, int64_t n_batch,
             const std::string& type_k, const std::string& type_v) {
            SessionOptions o{n_ctx, n_batch, kv_type_from_name(type_k), kv_type_from_name(type_v)};
            new (self) Session(std::move(engine), o);
          },
          nb::arg("engine"), nb::kw_only(), nb::arg("n_ctx") = 0, nb::arg("n_batch") = 512,
          nb::arg("type_k") = "f16", nb::arg("type_v") = "f16")
      .def_prop_ro("n_ctx", &Session::n_ctx)
      .def_prop_ro("n_batch", &Session::n_batch)
      .def_prop_ro("n_past", &Session::n_past)
      .def_prop_ro("n_dense", &Session::n_dense, "Leading positions that dense weights wrote.")
      .def_prop_ro("tokens", &Session::tokens)
      .def(
          "reusable",
          [](Session& s, const Tokens& tokens, const std::optional<std::string>& statistic,
             double alpha, bool weighted, int64_t samples) {
            return s.reusable(span_of<int32_t>(tokens),
                              spec_of(statistic, alpha, weighted, samples));
          },
          nb::arg("tokens").noconvert(), nb::arg("statistic") = nb::none(), nb::arg("alpha") = 0.4,
          nb::arg("weighted") = false, nb::arg("samples") = 0,
          "How many leading ids a prefill of tokens may keep; always leaves the last to run.")
      .def("keep", &Session::keep, nb::arg("n"), "Forgets all positions from n on.")
      .def("reset", &Session::reset)
      .def("prefill", &prefill, nb::arg("tokens").noconvert(), nb::kw_only(),
           nb::arg("statistic") = nb::none(), nb::arg("alpha") = 0.4, nb::arg("weighted") = false,
           nb::arg("samples") = 0, nb::arg("progress") = nb::none(), nb::arg("beta") = nb::none(),
           nb::arg("layers") = nb::none(), nb::arg("first_layer") = CoreShare{}.first_layer,
           "Appends int32 tokens with the dense weights, counting for the statistic if given. With "
           "what the select that follows will be given, weights that are not resident are gathered "
           "as they pass by.")
      .def(
          "select",
          [](Session& s, double beta, const Layers& layers, double first_layer) {
            const CoreShare share = share_of(beta, layers, first_layer);
            nb::gil_scoped_release release;
            return s.select(share);
          },
          nb::kw_only(), nb::arg("beta"), nb::arg("layers") = nb::none(),
          nb::arg("first_layer") = CoreShare{}.first_layer,
          "The neurons of highest score, core_sizes of them.")
      .def(
          "stability",
          [](Session& s, double beta, const Layers& layers) {
            const CoreShare share{beta, range_of(layers)};
            nb::gil_scoped_release release;
            return s.stability(share);
          },
          nb::kw_only(), nb::arg("beta"), nb::arg("layers") = nb::none())
      .def(
          "samples",
          [](const Session& s, int64_t layer) {
            const FfnSamples& samples = s.samples();
            const ModelConfig& c = s.engine().config();
            if (layer < 0 || layer >= c.n_layer) throw nb::index_error("no such layer");
            const auto rows = [&](int64_t width, auto visit) {
              Array<float> a = make_array<float>(
                  {static_cast<size_t>(samples.size()), static_cast<size_t>(width)});
              (samples.*visit)(layer, [&](int64_t row, const float* values) {
                std::copy_n(values, width, a.data() + row * width);
              });
              return a;
            };
            return std::pair(rows(c.n_ff, &FfnSamples::visit_h),
                             rows(c.n_embd, &FfnSamples::visit_y));
          },
          nb::arg("layer"),
          "What the prefill kept of its last tokens: inputs (n, n_ff) and outputs (n, n_embd) of "
          "the "
          "layer's down projection, float32.")
      .def("set_core", &Session::set_core, nb::arg("core_set").none(),
           nb::call_guard<nb::gil_scoped_release>(),
           "Compacts and decodes with these neurons from now on; None: the dense weights.")
      .def(
          "fit_patch",
          [](Session& s, const PatchPrior* prior, int64_t rank, double decay, double ridge,
             double prior_weight) {
            nb::gil_scoped_release release;
            s.fit_patch({rank, decay, ridge, prior_weight}, prior);
          },
          nb::arg("prior").none() = nb::none(), nb::kw_only(), nb::arg("rank") = PatchSpec{}.rank,
          nb::arg("decay") = PatchSpec{}.decay, nb::arg("ridge") = PatchSpec{}.ridge,
          nb::arg("prior_weight") = PatchSpec{}.prior,
          "Lets the kept neurons of the present core set answer for the dropped ones, as learned "
          "from the prompt's samples, and from a prior; core_set then carries the patch.")
      .def_prop_ro("patch_bytes", &Session::patch_bytes)
      .def_prop_ro("core_set", [](const Session& s) { return s.core_set(); })
      .def_prop_ro("decode_weight_bytes", &Session::decode_weight_bytes)
      .def("decode", &Session::decode, nb::arg("token"), nb::arg("sampler").none() = nb::none(),
           nb::call_guard<nb::gil_scoped_release>(),
           "One token; in exact mode a copy of the sampler draws the drafts.")
      .def(
          "set_exact",
          [](Session& s, double beta, const Layers& layers, double first_layer, int64_t max_drafts,
             bool core, bool text, bool paced) {
            s.set_exact(
                ExactSpec{share_of(beta, layers, first_layer), max_drafts, core, text, paced});
          },
          nb::kw_only(), nb::arg("beta") = ExactSpec{}.share.beta, nb::arg("layers") = nb::none(),
          nb::arg("first_layer") = CoreShare{}.first_layer,
          nb::arg("max_drafts") = ExactSpec{}.max_drafts, nb::arg("core") = true,
          nb::arg("text") = true, nb::arg("paced") = true,
          "From now on decode gives the dense weights' logits and uses core neurons to draft.")
      .def("end_exact", [](Session& s) { s.set_exact(std::nullopt); })
      .def_prop_ro("exact", &Session::exact)
      .def_prop_ro("expected", &Session::expected,
                   "The token that exact mode expects next and has looked at, or None.")
      .def_prop_ro("pace", &pace_dict,
                   "Exact mode: expected gain over dense decoding by source of drafts, or None.")
      .def(
          "replay",
          [](Session& s, const std::optional<std::string>& statistic, double alpha, bool weighted,
             int64_t samples) {
            const auto spec = spec_of(statistic, alpha, weighted, samples);
            nb::gil_scoped_release release;
            s.replay(spec, interrupted);
          },
          nb::kw_only(), nb::arg("statistic") = nb::none(), nb::arg("alpha") = 0.4,
          nb::arg("weighted") = false, nb::arg("samples") = 0,
          "Reads again, dense, what was decoded with core weights or is not counted and sampled.")
      .def(
          "verify",
          [](Session& s, const Tokens& tokens) { return rows_of(s, tokens, &Session::verify); },
          nb::arg("tokens").noconvert(), "(n, n_vocab) float32 logits through the decode weights.")
      .def(
          "score",
          [](Session& s, const Tokens& tokens) { return rows_of(s, tokens, &Session::score); },
          nb::arg("continuation").noconvert(),
          "(n, n_vocab) float32 ln p before each token of the continuation, row 0 from the present "
          "logits, the rest through the decode weights.")
      .def("logits", [](const Session& s) { return copy_array<float>(s.logits()); })
      .def(
          "logprobs",
          [](const Session& s, int32_t top_n, int32_t token) {
            const auto logits = s.logits();
            if (token < 0 || static_cast<size_t>(token) >= logits.size()) {
              throw nb::index_error("token is not an id of the vocabulary");
            }
            const double norm = log_sum_exp(logits);
            const double own = logits[static_cast<size_t>(token)] - norm;
            return std::pair(static_cast<float>(own), top_logprobs(logits, top_n));
          },
          nb::arg("top_n"), nb::arg("token"), "ln p(token) and the top_n (id, ln p).")
      .def(
          "sample",
          [](const Session& s, Sampler& sampler) {
            nb::gil_scoped_release release;
            const int32_t token = s.sample(sampler);
            sampler.accept(token);
            return token;
          },
          nb::arg("sampler"), "Draws from the last logits; the sampler remembers the token.")
      .def("save_state",
           [](Session& s) {
             const std::vector<std::byte> state = s.save_state();
             return nb::bytes(state.data(), state.size());
           })
      .def(
          "load_state",
          [](Session& s, const nb::bytes& state) {
            const auto* data = static_cast<const std::byte*>(state.data());
            const std::span<const std::byte> bytes(data, state.size());
            nb::gil_scoped_release release;
            s.load_state(bytes);
          },
          nb::arg("data"))
      .def_prop_ro("timings", &timings_dict)
      .def_prop_ro("kv_bytes", &Session::kv_bytes);
}

}  // namespace coreinfer::python
