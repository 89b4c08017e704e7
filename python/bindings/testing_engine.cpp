#include <nanobind/stl/string.h>

#include "bindings/arrays.h"
#include "engine/draft_pace.h"
#include "engine/memory_plan.h"
#include "engine/text_drafts.h"
#include "model/arch/arch.h"

namespace coreinfer::python {
namespace {

DraftPace::Source source_of(bool text) { return text ? DraftPace::kText : DraftPace::kCore; }

}  // namespace

void bind_testing_engine(nb::module_& testing) {
  nb::class_<DraftPace>(testing, "DraftPace", "How many tokens exact mode drafts.")
      .def(nb::init<>())
      .def("verified", &DraftPace::verified, nb::arg("rows"), nb::arg("seconds"))
      .def("drafted", &DraftPace::drafted, nb::arg("n"), nb::arg("seconds"))
      .def(
          "judged",
          [](DraftPace& p, int64_t offered, int64_t accepted, bool text) {
            p.judged(source_of(text), offered, accepted);
          },
          nb::arg("offered"), nb::arg("accepted"), nb::arg("text") = false)
      .def(
          "length",
          [](const DraftPace& p, int64_t limit, double entry, bool text) {
            return p.length(source_of(text), limit, entry);
          },
          nb::arg("limit"), nb::arg("entry") = 0.0, nb::arg("text") = false)
      .def(
          "gain", [](const DraftPace& p, bool text) { return p.gain(source_of(text)); },
          nb::arg("text") = false);
  testing.def(
      "ffn_resident_within",
      [](const std::string& path, uint64_t limit, uint64_t own, double core_share, int64_t n_ctx,
         int64_t n_batch) {
        const auto file = GgufFile::open(path);
        const ModelConfig config = read_config(*file);
        MemoryBudget budget;
        budget.limit = limit;
        budget.process = own;
        budget.file_pages = false;
        budget.core_share = core_share;
        budget.session = session_memory(checked({n_ctx, n_batch}, config), config);
        budget.name = "vram_limit";
        return MemoryPlan(budget, *file, config, *make_cpu_backend({})).ffn_resident();
      },
      nb::arg("path"), nb::arg("limit"), nb::arg("own"), nb::arg("core_share"), nb::arg("n_ctx"),
      nb::arg("n_batch"), "What a GPU of that much memory leaves room for; reads no weights.");
  testing.def(
      "text_drafts",
      [](const nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& tokens,
         int64_t n) { return copy_array<int32_t>(text_drafts(span_of<int32_t>(tokens), n)); },
      nb::arg("tokens").noconvert(), nb::arg("n"));
}

}  // namespace coreinfer::python
