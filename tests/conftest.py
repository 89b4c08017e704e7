"""Fixtures: a tiny model, and real models and reference data, which skip by name where absent."""

from __future__ import annotations

import os

# Read when NumPy is imported. Its threads wait busily, beside those of what is tested: on two cores
# the references took three times as long with two of them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import types
from pathlib import Path

import pytest

from coreinfer._core import testing
from small_clusters import letters
from tiny_llama import load, make_tiny_llama

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A tiny random llama (tiny_llama.py)."""
    return make_tiny_llama(tmp_path_factory.mktemp("llama") / "tiny.gguf")


@pytest.fixture
def llm(tiny):
    with load(tiny) as llm:
        yield llm


@pytest.fixture(params=testing.available_isas())
def forced_isa(request, monkeypatch) -> str:
    """Each instruction set of this machine, plainest first; engines made in the test use it."""
    monkeypatch.setenv("COREINFER_ISA", request.param)
    return request.param


@pytest.fixture
def sentence_transformers(monkeypatch) -> list[str]:
    """The two modules that a named embedder is loaded with, in small; the names they were given."""
    given: list[str] = []

    class SentenceTransformer:
        def __init__(self, name: str) -> None:
            given.append(name)
            if name == "unknown":
                raise OSError("no such model\nand a long explanation")

        def encode(self, texts, **_):
            return letters(texts)

    logging = types.SimpleNamespace(
        is_progress_bar_enabled=lambda: False, disable_progress_bar=lambda: None
    )
    for name, members in {
        "sentence_transformers": {"SentenceTransformer": SentenceTransformer},
        "transformers": {},
        "transformers.utils": {"logging": logging},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return given


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Reference data that lies beside some checkouts; a user's machine does not have it."""
    path = ROOT.parent / "shared"
    if not (path / "golden").is_dir():
        pytest.skip("reference data not present beside the checkout (../shared/golden)")
    return path


def _model(variable: str, names: list[str]) -> Path | None:
    given = os.environ.get(variable)
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "coreinfer"
    for name in names:
        if (cache / name).is_file():
            return cache / name
    return None


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1: from the cache, else fetched as `coreinfer pull smollm2` does."""
    path = _model("COREINFER_MODEL_SMOLLM2", [])
    if path is not None:
        return path
    from coreinfer.models import ModelFetchError, resolve_model

    try:
        return Path(resolve_model("smollm2"))
    except ModelFetchError as error:
        pytest.skip(f"SmolLM2 is neither cached nor fetchable: {error}")


@pytest.fixture(scope="session")
def qwen_path() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct Q4_K_M: used where it lies, never fetched (half a gigabyte)."""
    path = _model("COREINFER_MODEL_QWEN", ["qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"])
    if path is None:
        pytest.skip("Qwen2.5-Coder-0.5B not present (set COREINFER_MODEL_QWEN to its GGUF)")
    return path
