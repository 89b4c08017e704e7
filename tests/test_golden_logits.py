"""Real models, dense: as close to float32 as llama.cpp is, by its own formula and figures."""

from __future__ import annotations

import hashlib

import pytest

from measure_fidelity import Fidelity


def check_bars(model, golden):
    fidelity = Fidelity(str(model), str(golden))
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


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("smollm2_path", "smollm2-135m-instruct-q4_1"),
        ("qwen_path", "qwen2.5-coder-0.5b-instruct-q4_k_m"),
    ],
)
def test_dense_is_as_faithful_as_llama_cpp(request, shared_dir, fixture, name):
    model = request.getfixturevalue(fixture)
    golden = shared_dir / "golden" / f"{name}.json"
    assert file_is(model, golden), "the goldens are of another file"
    check_bars(model, golden)
