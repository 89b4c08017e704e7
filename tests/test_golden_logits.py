"""Real models, dense: as close to float32 as llama.cpp is, by its own formula and figures."""

from __future__ import annotations

import hashlib
import json

from measure_fidelity import Fidelity


def check_bars(model, golden, isa=None):
    fidelity = Fidelity(str(model), str(golden))
    assert isa in (None, fidelity.engine.backend["isa"])
    figures = fidelity.dense_figures()
    assert figures["kl20"] <= 1.1 * fidelity.golden["llama_cpp_mean_kl20"]
    assert figures["agreement"] >= fidelity.golden["llama_cpp_top1_agreement"] - 0.005


def file_is(model, golden) -> bool:
    with open(model, "rb") as file:
        digest = (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
    return digest in golden.read_text()


def golden_of(model, shared_dir, name):
    golden = shared_dir / "golden" / f"{name}.json"
    assert file_is(model, golden), "the goldens are of another file"
    return golden


def test_dense_is_as_faithful_as_llama_cpp(qwen_path, shared_dir):
    check_bars(qwen_path, golden_of(qwen_path, shared_dir, "qwen2.5-coder-0.5b-instruct-q4_k_m"))


def test_every_instruction_set_is_as_faithful_as_llama_cpp(
    smollm2_path, shared_dir, tmp_path, forced_isa
):
    golden = golden_of(smollm2_path, shared_dir, "smollm2-135m-instruct-q4_1")
    if forced_isa == "scalar":
        # The plain kernels take 40 s for all 11 texts, 4 s for these two.
        some = json.loads(golden.read_text())
        some["generate"] = some["generate"][1::7]
        golden = tmp_path / golden.name
        golden.write_text(json.dumps(some))
    check_bars(smollm2_path, golden, forced_isa)
