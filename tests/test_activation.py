"""Models whose activation is not their architecture's own: read from the file, or as the user says;
and files for PowerInfer, which have such models, are refused as what they are."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import make_synthetic_model
from coreinfer import CoreSet, Llama, _core
from coreinfer.cli import main
from coreinfer.tuning import Tuning
from make_synthetic_model import make_tiny_model
from model_shape import tensor_specs
from reference.model import ReferenceModel
from small_clusters import make_clusters
from tiny_llama import PROMPT, load, make_tiny_llama

TOOLS = Path(make_synthetic_model.__file__).parent
TOKENS = np.random.default_rng(0).integers(0, 300, 30, dtype=np.int32)
NAMES = ["relu", "drelu", "fatrelu:0.01", "gelu_tanh"]


def logits_of(path: str, **options) -> np.ndarray:
    session = _core.Session(
        _core.Engine(path, f32_activations=True, **options), type_k="f32", type_v="f32"
    )
    session.prefill(TOKENS)
    return session.logits()


@pytest.fixture(scope="module")
def lost(tmp_path_factory) -> str:
    """A llama that does not say its activation, as llama.cpp's converter writes it."""
    return make_tiny_llama(tmp_path_factory.mktemp("activation") / "lost.gguf")


@pytest.mark.parametrize("name", NAMES)
def test_the_user_s_word_does_what_the_file_s_does(lost, tmp_path, name):
    path = str(tmp_path / "m.gguf")
    make_tiny_model(path, "llama", activation=name)
    engine = _core.Engine(lost, activation=name)
    assert engine.config["activation"] == _core.Engine(path).config["activation"] == name
    got = logits_of(lost, activation=name)
    np.testing.assert_array_equal(got, logits_of(path))
    expected = ReferenceModel(path).forward(TOKENS).logits[-1]
    np.testing.assert_allclose(got, expected, atol=3e-4 * expected.std())
    assert np.abs(got - logits_of(lost)).max() > 0.1


@pytest.mark.parametrize("statistic", ["count", "count_gate", "flock"])
def test_neurons_that_a_prompt_leaves_silent_are_never_core(tmp_path, statistic):
    path = str(tmp_path / "m.gguf")
    make_tiny_model(path, "llama-relu")
    forward = ReferenceModel(path).forward(TOKENS[:3])
    active = {"count": forward.h > 0, "count_gate": forward.act > 0, "flock": forward.h != 0}
    session = _core.Session(_core.Engine(path, f32_activations=True), type_k="f32", type_v="f32")
    session.prefill(TOKENS[:3], statistic=statistic, alpha=1.0)
    for got, expected in zip(session.select(beta=1.0).layers, active[statistic], strict=True):
        assert 0 < len(got) < 512
        np.testing.assert_array_equal(got, np.flatnonzero(expected.any(axis=0)))


def test_what_belongs_to_the_model_belongs_to_its_activation(lost, tmp_path):
    file = _core.GgufFile(lost)
    assert _core.fingerprint(file) == _core.fingerprint(file, "silu") == file.fingerprint
    assert _core.Engine(lost, activation="swish").fingerprint == file.fingerprint
    prints = {_core.fingerprint(file, name) for name in NAMES}
    assert len(prints | {file.fingerprint}) == len(NAMES) + 1
    with load(lost, core="stable", beta=0.4, activation="relu") as llm:
        assert llm.fingerprint == _core.fingerprint(file, "relu")
        llm.create_completion(PROMPT.decode(), max_tokens=3)
        llm.core_set.save(tmp_path / "core.npz")
        state = llm.save_state()
    core = CoreSet.load(tmp_path / "core.npz")
    assert load(lost, core=core, activation="relu").core == core
    with pytest.raises(ValueError, match="belongs to another model"):
        load(lost, core=core)
    with load(lost) as llm, pytest.raises(ValueError, match="another model"):
        llm.load_state(state)


def test_the_command_line_takes_it(lost, capsys):
    command = ["run", lost, "-p", "The river", "-n", "8", "--threads", "1"]
    assert main([*command, "--activation", "relu"]) == 0
    relu = capsys.readouterr().out
    with Llama(lost, activation="relu", verbose=False, n_threads=1) as llm:
        text = llm.create_chat_completion(
            [{"role": "user", "content": "The river"}], max_tokens=8, temperature=0
        )
    assert text["choices"][0]["message"]["content"] in relu
    assert main(command) == 0
    assert capsys.readouterr().out != relu


@pytest.mark.parametrize(
    "name", ["gelu", "fatrelu", "fatrelu:", "fatrelu:-1", "fatrelu:nan", "ReLU"]
)
def test_unknown_activations_are_refused_with_the_known_ones(lost, name):
    with pytest.raises(ValueError) as error:
        _core.Engine(lost, activation=name)
    assert str(error.value) == (
        f"activation is '{name}', expected one of silu, gelu_tanh, relu, drelu, fatrelu:THRESHOLD"
    )


@pytest.mark.parametrize(
    ("arch", "keys", "message"),
    [
        ("llama", {"hidden_activation": "gelu"}, 'hidden_activation is "gelu"'),
        ("llama", {"hidden_activation": "fatrelu"}, "hidden_activation_threshold"),
        ("llama", {"hidden_activation": 3}, "hidden_activation"),
        (
            "llama",
            {"hidden_activation": "fatrelu", "hidden_activation_threshold": -0.5},
            "hidden_activation_threshold is -0.5",
        ),
        ("opt", {"hidden_activation": "drelu"}, "only where there is a gate"),
    ],
)
def test_activations_of_files_are_checked(tmp_path, arch, keys, message):
    path = str(tmp_path / "m.gguf")
    make_tiny_model(path, arch, extra_metadata={f"{arch}.{k}": v for k, v in keys.items()})
    with pytest.raises(_core.GGUFError, match=message) as error:
        _core.Engine(path)
    assert path in str(error.value)


def test_files_for_powerinfer_are_refused_as_such(lost, tmp_path, monkeypatch):
    newer, older = tmp_path / "newer.gguf", tmp_path / "older.gguf"
    newer.write_bytes(b"PWRI" + Path(lost).read_bytes()[4:])

    def transposed(shape):
        for spec in tensor_specs(shape):
            down = spec.name.endswith("ffn_down.weight")
            name = spec.name.replace("ffn_down", "ffn_down_t")
            yield replace(spec, name=name, shape=spec.shape[::-1]) if down else spec

    monkeypatch.setattr(make_synthetic_model, "tensor_specs", transposed)
    make_tiny_model(older, "llama")
    for path in (newer, older):
        with pytest.raises(
            _core.GGUFError, match="PowerInfer.*convert the original model"
        ) as error:
            _core.Engine(str(path))
        assert str(path) in str(error.value)


MEASURING = {
    "auto": "{model} --data t.txt --tuning tuning.json",
    "exact": "{model} --data t.txt",
    "fidelity": "{model} golden.json",
    "patch": "{model} --data t.txt",
    "refresh": "{model} --text t.txt",
    "similarity": "{model} clusters.npz --data t.jsonl --fields text",
    "start": "{model} --data t.txt",
}


@pytest.mark.parametrize("name", MEASURING)
def test_the_measuring_tools_take_an_activation(lost, tmp_path, monkeypatch, name):
    assert {path.stem for path in TOOLS.glob("measure_*.py")} == {f"measure_{n}" for n in MEASURING}
    monkeypatch.chdir(tmp_path)
    make_clusters().save("clusters.npz")
    Tuning(1, ()).save("tuning.json")
    Path("t.jsonl").write_text('{"text": "a"}')
    module = importlib.import_module(f"measure_{name}")

    class Loaded(Exception):
        pass

    def load(*_, activation, **__):
        raise Loaded(activation)

    monkeypatch.setattr(module, "Fidelity" if name == "fidelity" else "Llama", load)
    argv = [*MEASURING[name].format(model=lost).split(), "--activation", "relu"]
    monkeypatch.setattr("sys.argv", [name, *argv])
    with pytest.raises(Loaded, match="relu"):
        module.main()
