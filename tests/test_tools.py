"""make_synthetic_model: the files it writes are what they say, and nothing else is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

import make_synthetic_model
from gguf_stream import TENSOR_KINDS, block_size
from make_synthetic_model import main, make_paper_model, make_tiny_model
from model_shape import ARCHITECTURES, ModelShape, rope_factors, tensor_specs
from reference.model import ReferenceModel
from reference.quant import GgufTensors
from synthetic_blocks import TENSOR_TYPES, random_blocks
from synthetic_shapes import PAPER, TINY
from synthetic_vocab import byte_symbols, make_vocabulary


@pytest.mark.parametrize("dtype", TENSOR_TYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiny_model_reads_back_with_its_shapes_types_and_value_range(arch, dtype, tmp_path):
    shape = make_tiny_model(tmp_path / "m.gguf", arch, dtype, n_layer=1)
    file = GgufTensors(tmp_path / "m.gguf")
    specs = tensor_specs(shape)
    assert file.names() == [spec.name for spec in specs]
    for spec in specs:
        values = file.load(spec.name)
        assert values.shape == spec.shape
        assert np.isfinite(values).all()
        assert file.tensor_type(spec.name) == (dtype if spec.kind == "matrix" else "F32")
        if spec.kind == "matrix":
            # at least 32 768 values; block scales vary by 40 %, sub-scales add to the spread
            assert np.std(values) / spec.scale == pytest.approx(1.0, abs=0.1)
            assert abs(np.mean(values)) < 0.15 * spec.scale


@pytest.mark.parametrize("dtype", TENSOR_TYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiny_model_has_logits_that_differ_and_do_not_overflow(arch, dtype, tmp_path):
    make_tiny_model(tmp_path / "m.gguf", arch, dtype)
    logits = ReferenceModel(tmp_path / "m.gguf").forward([7, 100, 31, 200]).logits
    assert 1.5 < logits.std() < 6.0
    best = np.sort(logits, axis=-1)
    assert np.median(best[:, -1] - best[:, -2]) > 0.05


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_tiny_model(tmp_path / name, "llama", "Q4_K", seed=seed, n_layer=1)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c and len(a) == len(c)


def test_quantised_model_is_the_quantisation_of_the_float_one(tmp_path):
    files = {}
    for dtype in ("F32", "Q8_0", "BF16"):
        make_tiny_model(tmp_path / dtype, "qwen2", dtype, n_layer=1)
        files[dtype] = GgufTensors(tmp_path / dtype)
    exact = files["F32"].load("blk.0.ffn_up.weight")
    # Q8_0 steps are max / 127 of a block of 32; bfloat16 keeps 8 bits
    assert (
        np.abs(files["Q8_0"].load("blk.0.ffn_up.weight") - exact).max()
        < 0.55 * np.abs(exact).max() / 127
    )
    np.testing.assert_allclose(files["BF16"].load("blk.0.ffn_up.weight"), exact, rtol=2**-8)


def test_metadata_is_what_llama_cpp_asks_for(tmp_path):
    make_tiny_model(
        tmp_path / "m.gguf", "gemma3", n_layer=1, rope_scaling={"type": "linear", "factor": 8.0}
    )
    file = GgufTensors(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "gemma3",
        "gemma3.block_count": 1,
        "gemma3.embedding_length": 256,
        "gemma3.feed_forward_length": 512,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 1,
        "gemma3.attention.key_length": 128,
        "gemma3.attention.value_length": 128,
        "gemma3.attention.sliding_window": 8,
        "gemma3.context_length": 256,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": True,
        "general.file_type": 0,
    }
    assert {key: file.field(key) for key in expected} == expected
    assert file.field("gemma3.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    make_tiny_model(tmp_path / "o.gguf", "opt", n_layer=1)
    opt = GgufTensors(tmp_path / "o.gguf")
    assert opt.field("opt.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert opt.field("opt.rope.freq_base") is None
    assert opt.load("position_embd.weight").shape == (258, 256)


def test_rope_factors_leave_short_waves_and_stretch_long_ones():
    scaling = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_context_length": 64,
    }
    shape = ModelShape("llama", 1, 64, 64, 1, 1, 64, 300, 64, rope_scaling=scaling)
    factors = rope_factors(shape, "rope_freqs.weight")
    waves = 2 * np.pi * 10000.0 ** (np.arange(32) / 32)
    assert (factors[waves < 16] == 1).all() and (factors[waves > 64] == 8).all()
    between = factors[(waves > 16) & (waves < 64)]
    assert len(between) > 2 and (np.diff(between) > 0).all()
    assert between.min() > 1 and between.max() < 8


def test_overrides_types_metadata_and_edits_are_applied(tmp_path):
    path = tmp_path / "m.gguf"
    shape = make_tiny_model(
        path,
        "llama",
        "Q4_0",
        n_layer=1,
        n_embd=64,
        n_ff=96,
        tied=True,
        types={"ffn_down": "Q8_0", "output_norm.weight": "F16"},
        extra_metadata={"llama.rope.freq_base": None, "general.name": "other"},
        edit=lambda name, values: values * 0 if name == "blk.0.attn_norm.weight" else values,
    )
    assert (shape.n_embd, shape.head_dim, shape.tied) == (64, 16, True)
    file = GgufTensors(path)
    assert "output.weight" not in file
    assert file.tensor_type("blk.0.ffn_down.weight") == "Q8_0"
    assert file.tensor_type("blk.0.ffn_up.weight") == "Q4_0"
    assert file.tensor_type("output_norm.weight") == "F16"
    assert file.field("llama.rope.freq_base") is None
    assert file.field("general.name") == "other"
    assert not file.load("blk.0.attn_norm.weight").any()
    assert file.load("output_norm.weight").all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "mamba"}, "'mamba'"),
        ({"dtype": "Q9_9"}, "'Q9_9'"),
        ({"n_heads": 3}, "n_heads"),
        ({"dtype": "Q4_K", "n_ff": 300}, "blk.0.ffn_down.weight: rows of 300"),
        ({"n_head": 3, "n_head_kv": 2, "head_dim": 64}, "n_head"),
        ({"head_dim": 63}, "head_dim"),
        ({"arch": "opt", "tied": False}, "tied"),
        ({"arch": "qwen2", "rope_scaling": {"type": "llama3"}}, "'llama3'"),
        ({"n_vocab": 100}, "259"),
    ],
)
def test_impossible_models_are_refused_and_leave_no_file(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_tiny_model(tmp_path / "m.gguf", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_failure_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "m.gguf"
    make_tiny_model(path, "llama", n_layer=1)
    before = path.read_bytes()

    def fail(name: str, values: np.ndarray) -> np.ndarray:
        if name == "blk.0.ffn_up.weight":
            raise RuntimeError("as when the disk is full")
        return values

    with pytest.raises(RuntimeError):
        make_tiny_model(path, "llama", seed=5, n_layer=1, edit=fail)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


# --- vocabulary ------------------------------------------------------------------------------


def test_byte_symbols_are_distinct_and_printable():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    assert symbols[ord("A")] == "A" and symbols[ord(" ")] == "\u0120"
    assert not any(s.isspace() for s in symbols)


@pytest.mark.parametrize("n_vocab", [259, 320, 5000])
def test_vocabulary_has_the_size_asked_for_and_encodes_any_text(n_vocab):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = make_vocabulary(n_vocab)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == n_vocab
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    assert all(left + right in ids for left, right in merges)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "The river, at 10:42 — naïve 水\n\tand the clock."
    encoded = tokenizer.encode(text).ids
    assert tokenizer.decode(encoded) == text
    if n_vocab > 300:
        assert len(encoded) < len(text.encode())
    assert vocabulary.tokens[vocabulary.eos_id] == "<|eos|>"


# --- paper shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        ("llama2-7b", 6.74e9),
        ("llama3.1-8b", 8.03e9),
        ("opt-6.7b", 6.66e9),
        ("opt-13b", 12.85e9),
        ("qwen2.5-7b", 7.62e9),
        ("smollm2-135m", 134.5e6),
    ],
)
def test_paper_shapes_have_the_published_number_of_parameters(name, n_params):
    total = sum(int(np.prod(spec.shape)) for spec in tensor_specs(PAPER[name]))
    assert total == pytest.approx(n_params, rel=2e-3)


def test_paper_model_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    assert (
        main(
            [
                "--shape",
                "smollm2-135m",
                "--type",
                "q4_1",
                "--output-type",
                "q8_0",
                "--layers",
                "1",
                "--out",
                str(path),
            ]
        )
        == 0
    )
    assert "0.03 GB" in capsys.readouterr().out
    model = ReferenceModel(path, np.float32)
    file = model.file
    assert file.tensor_type("token_embd.weight") == "Q8_0"  # the tied head
    assert file.tensor_type("blk.0.ffn_down.weight") == "Q4_1"
    assert len(file.field("tokenizer.ggml.tokens")) == 49152
    rows = file.load("token_embd.weight")
    assert rows.shape == (49152, 576)
    assert len({row.tobytes() for row in rows[:, :8]}) == 49152  # else their logits would tie
    assert 1.5 < model.forward([1, 2, 3]).logits.std() < 6.0


def test_paper_model_replaces_types_that_do_not_fit_and_says_so(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    assert (
        main(["--shape", "smollm2-135m", "--type", "q6_k", "--layers", "1", "--out", str(path)])
        == 0
    )
    assert "token_embd.weight Q6_K -> Q8_0" in capsys.readouterr().err
    file = GgufTensors(path)
    assert file.tensor_type("blk.0.attn_q.weight") == "Q8_0"  # rows of 576
    assert file.tensor_type("blk.0.ffn_down.weight") == "Q6_K"  # rows of 1536


@pytest.mark.parametrize("dtype", TENSOR_TYPES)
def test_pools_of_blocks_wrap_around_without_gaps(dtype, tmp_path, monkeypatch):
    """A pool smaller than a tensor: the file must still have every byte, all of them valid."""
    monkeypatch.setattr(make_synthetic_model, "POOL_BYTES", 20_000)
    shape = make_paper_model(tmp_path / "m.gguf", TINY["llama"], dtype)
    file = GgufTensors(tmp_path / "m.gguf")
    for spec in tensor_specs(shape):
        values = file.load(spec.name)
        assert values.shape == spec.shape and np.isfinite(values).all()
        if spec.kind == "matrix":  # about 100 blocks at least, whose scales vary by 40 %
            assert np.std(values) / spec.scale == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("zeros", [0.5, 0.95])
def test_relu_makes_about_the_asked_share_of_zeros(tmp_path, zeros):
    make_paper_model(tmp_path / "m.gguf", TINY["opt"], "F16", zeros=zeros)
    h = ReferenceModel(tmp_path / "m.gguf").forward(range(40, 60)).h
    assert (h == 0).mean() == pytest.approx(zeros, abs=0.03)


def test_command_line_errors(tmp_path, capsys):
    assert (
        main(
            [
                "--shape",
                "smollm2-135m",
                "--type",
                "q8_0",
                "--layers",
                "1",
                "--out",
                str(tmp_path / "none" / "m.gguf"),
            ]
        )
        == 1
    )
    assert "cannot write" in capsys.readouterr().err
    for arguments in (["--layers", "0"], ["--type", "q9_9"]):
        with pytest.raises(SystemExit) as stop:
            main(["--shape", "smollm2-135m", "--type", "q8_0", "--out", "x", *arguments])
        assert stop.value.code == 2


def test_random_blocks_use_every_code():
    """All 16 codes of Q4_0, all 256 of Q8_0: nothing of a kernel's table stays untried."""
    rng = np.random.default_rng(0)
    four = random_blocks(rng, "Q4_0", 2000, 1.0)[:, 2:]
    assert len(np.unique(four & 15)) == len(np.unique(four >> 4)) == 16
    assert len(np.unique(random_blocks(rng, "Q8_0", 2000, 1.0)[:, 2:])) == 256


def test_file_alignment_is_what_the_reader_of_the_gguf_package_expects(tmp_path):
    make_tiny_model(tmp_path / "m.gguf", "llama", "Q6_K", n_layer=1)
    reader = GGUFReader(str(tmp_path / "m.gguf"))
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    end = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
    assert 0 <= (tmp_path / "m.gguf").stat().st_size - end < 32


NO_GGUF = """
import sys
sys.modules["gguf"] = None  # as where the package is not installed
from make_synthetic_model import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("dtype", ["f16", "f32", "q8_0", "q4_0", "q4_k"])
def test_paper_size_models_are_made_without_the_gguf_package(dtype, tmp_path):
    path = tmp_path / "m.gguf"
    command = [sys.executable, "-c", NO_GGUF, "--shape", "smollm2-135m", "--layers", "1"]
    env = os.environ | {"PYTHONPATH": str(Path(make_synthetic_model.__file__).parent)}
    done = subprocess.run(
        [*command, "--type", dtype, "--out", str(path)], capture_output=True, text=True, env=env
    )
    assert (done.returncode, path.exists()) == (0, True), done.stderr
    shape = replace(PAPER["smollm2-135m"], n_layer=1)
    assert GgufTensors(path).names() == [spec.name for spec in tensor_specs(shape)]


def test_block_sizes_and_type_numbers_are_those_of_the_gguf_package():
    for name in TENSOR_TYPES:
        kind = GGMLQuantizationType[name]
        assert block_size(name) == GGML_QUANT_SIZES[kind]
        assert TENSOR_KINDS[name].number == kind
