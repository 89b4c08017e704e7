"""The converter: Hugging Face directories built by hand in, the same weights out as GGUF.

The directories are made from tiny GGUF models by the inverse of the converter's value changes;
that these have the right sense is held by tests/test_oracle.py, where transformers computed with
weights that went the same way.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert_hf_to_gguf import convert, main
from coreinfer import _core
from hf_architectures import from_gguf_values, hf_name, shape_from_config
from hf_checkpoint import CheckpointError
from make_synthetic_model import make_tiny_model
from model_shape import ModelShape
from reference.model import ReferenceModel
from reference.quant import GgufTensors
from synthetic_vocab import make_vocabulary

SMALL = {
    "n_layer": 2,
    "n_embd": 64,
    "n_ff": 96,
    "n_head": 4,
    "head_dim": 16,
    "n_vocab": 272,
    "n_ctx": 32,
}
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context_length": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama", **SMALL, "rope_scaling": LLAMA3, "mlp_bias": True},
    "qwen2": {"arch": "qwen2", **SMALL, "n_head_kv": 2, "tied": False, "rope_scaling": YARN},
    "qwen3": {"arch": "qwen3", **SMALL, "head_dim": 24, "attention_bias": True},
    "gemma": {"arch": "gemma", **SMALL, "head_dim": 24},
    "gemma2": {"arch": "gemma2", **SMALL, "n_layer": 4},
    "gemma3": {
        "arch": "gemma3",
        **SMALL,
        "n_layer": 6,
        "rope_scaling": {"type": "linear", "factor": 8.0},
    },
    "phi3": {
        "arch": "phi3",
        **SMALL,
        "n_head_kv": 2,
        "rope_dim": 12,
        "rope_scaling": {
            "type": "longrope",
            "original_context_length": 16,
            "attn_factor": 1.1180339887498949,  # sqrt(1 + ln 2 / ln 16)
            "short_factor": [1.0, 1.0, 1.25, 1.5, 1.75, 2.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        },
    },
    "granite": {"arch": "granite", **SMALL, "attention_bias": True, "mlp_bias": True},
    "minicpm": {"arch": "minicpm", **SMALL, "n_layer": 4, "logit_scale": 2.0},
    "smollm3": {"arch": "smollm3", **SMALL, "n_layer": 5, "mlp_bias": True},
    "olmo2": {"arch": "olmo2", **SMALL},
    "opt": {"arch": "opt", **SMALL},
}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def config_of(shape: ModelShape) -> dict[str, Any]:
    """A config.json in the words of the first transformers version that had the model."""
    config = {
        "vocab_size": shape.n_vocab,
        "hidden_size": shape.n_embd,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "max_position_embeddings": shape.n_ctx,
        "tie_word_embeddings": shape.tied,
    }
    if shape.arch == "opt":
        return config | {
            "architectures": ["OPTForCausalLM"],
            "ffn_dim": shape.n_ff,
            "word_embed_proj_dim": shape.n_embd,
            "activation_function": "relu",
        }
    config |= {
        "architectures": [
            {"smollm3": "SmolLM3", "minicpm": "MiniCPM"}.get(shape.arch, shape.arch.capitalize())
            + "ForCausalLM"
        ],
        "intermediate_size": shape.n_ff,
        "num_key_value_heads": shape.n_head_kv,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_freq_base,
        "attention_bias": shape.attention_bias,
        "mlp_bias": shape.mlp_bias,
    }
    scaling = dict(shape.rope_scaling or {})
    if scaling:
        if "original_context_length" in scaling:
            scaling["original_max_position_embeddings"] = scaling.pop("original_context_length")
        config["rope_scaling"] = scaling
    if shape.arch == "phi3":
        # Phi-3's has this one beside the scaling, and leaves the factor on cos and sin out.
        key = "original_max_position_embeddings"
        config[key] = scaling.pop(key)
        del scaling["attn_factor"], config["head_dim"]
        config["partial_rotary_factor"] = shape.n_rotated / shape.head_dim
        config["sliding_window"] = shape.sliding_window
    if shape.arch == "minicpm":
        return config | {
            "scale_emb": shape.embedding_scale,
            "scale_depth": shape.residual_scale * shape.n_layer**0.5,
            "dim_model_base": shape.n_embd / shape.logit_scale,
            "hidden_act": "fatrelu",
            "hidden_act_param": 0.1,
        }
    if shape.arch == "granite":
        config |= {
            "embedding_multiplier": shape.embedding_scale,
            "residual_multiplier": shape.residual_scale,
            "attention_multiplier": shape.attention_scale,
            "logits_scaling": shape.logit_scale,
        }
    if shape.arch == "gemma":
        return config | {"hidden_act": "gelu"}
    if shape.arch == "gemma2":
        return config | {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": shape.head_dim,
            "sliding_window": shape.sliding_window,
            "attn_logit_softcapping": shape.attn_softcap,
            "final_logit_softcapping": shape.final_softcap,
        }
    if shape.arch == "gemma3":
        return config | {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": shape.head_dim,
            "sliding_window_pattern": 6,
            "sliding_window": shape.sliding_window,
            "rope_local_base_freq": 10000.0,
        }
    return config | {"hidden_act": "silu"}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    header, data = {}, b""
    for name, values in tensors.items():
        if dtype == "BF16":
            raw = (values.astype("<f4").view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            raw = values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tokenizer_json(n_vocab: int) -> dict[str, Any]:
    vocabulary = make_vocabulary(n_vocab)
    control = (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
    return {
        "added_tokens": [
            {"id": i, "content": vocabulary.tokens[i], "special": True} for i in control
        ],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
        },
        "model": {
            "type": "BPE",
            "merges": [m.split(" ") for m in vocabulary.merges],
            "vocab": {t: i for i, t in enumerate(vocabulary.tokens)},
        },
    }


def make_directory(folder: Path, name: str, dtype: str = "F32") -> tuple[Path, Path, ModelShape]:
    """(Hugging Face directory, the GGUF that its weights came from, shape)"""
    original = folder / "original.gguf"
    shape = make_tiny_model(original, **MODELS[name])
    file = GgufTensors(original)
    tensors = {
        hf_name(shape.arch, n): from_gguf_values(shape, n, file.load(n))
        for n in file.names()
        if not n.startswith("rope_")
    }
    if shape.arch == "opt":
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    directory = folder / "model"
    directory.mkdir()
    names = list(tensors)
    half = len(names) // 2
    for i, part in enumerate((names[:half], names[half:])):
        write_safetensors(
            directory / f"model-0000{i + 1}-of-00002.safetensors",
            {n: tensors[n] for n in part},
            dtype,
        )
    write_json(directory / "config.json", config_of(shape))
    write_json(directory / "tokenizer.json", tokenizer_json(shape.n_vocab))
    write_json(
        directory / "tokenizer_config.json",
        {
            "eos_token": "<|eos|>",
            "pad_token": {"content": "<|pad|>"},
            "chat_template": "{{ messages }}",
        },
    )
    return directory, original, shape


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def change_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


@pytest.mark.parametrize("name", MODELS)
def test_converted_model_has_the_weights_and_metadata_it_came_from(name, tmp_path):
    directory, original, shape = make_directory(tmp_path, name)
    assert convert(directory, tmp_path / "out.gguf", "F32") == shape
    expected, found = GgufTensors(original), GgufTensors(tmp_path / "out.gguf")
    assert found.names() == expected.names()
    for tensor in expected.names():
        # Gemma's norms went through w - 1 and back, in float32
        np.testing.assert_allclose(
            found.load(tensor),
            expected.load(tensor),
            rtol=0,
            atol=2e-7 if name.startswith("gemma") else 0,
        )
    arch = [key for key in expected.keys() if key.startswith((shape.arch, "general.arch"))]
    assert len(arch) >= 8
    for key in arch:
        assert found.field(key) == expected.field(key), key


def test_converted_tokenizer_is_the_one_in_tokenizer_json(tmp_path):
    directory, original, _ = make_directory(tmp_path, "opt")
    convert(directory, tmp_path / "out.gguf")
    expected, found = GgufTensors(original), GgufTensors(tmp_path / "out.gguf")
    for key in expected.keys():
        if key.startswith("tokenizer."):
            assert found.field(key) == expected.field(key), key
    assert found.field("tokenizer.ggml.add_eos_token") is False
    assert found.field("tokenizer.chat_template") == "{{ messages }}"


@pytest.mark.parametrize(
    ("stored", "outtype", "tolerance"),
    [
        ("F16", "F16", 2**-11),
        ("BF16", "BF16", 2**-7),
        ("BF16", "F32", 2**-7),
        ("F32", "Q8_0", None),
    ],
)
def test_types_in_and_out(stored, outtype, tolerance, tmp_path):
    directory, original, _ = make_directory(tmp_path, "qwen2", stored)
    convert(directory, tmp_path / "out.gguf", outtype)
    expected, found = GgufTensors(original), GgufTensors(tmp_path / "out.gguf")
    name = "blk.1.ffn_down.weight"
    assert found.tensor_type(name) == outtype
    assert found.tensor_type("blk.1.attn_q.bias") == "F32"
    a, b = expected.load(name), found.load(name)
    if tolerance is None:
        assert np.abs(a - b).max() < 0.55 * np.abs(a).max() / 127  # half a step of a block
    else:
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=1e-7)


def test_rows_that_are_not_whole_blocks_become_f16(tmp_path):
    directory, _, _ = make_directory(tmp_path, "opt")
    shape = make_tiny_model(tmp_path / "odd.gguf", "opt", **(SMALL | {"n_ff": 80}))
    file = GgufTensors(tmp_path / "odd.gguf")
    for old in directory.glob("*.safetensors"):
        old.unlink()
    write_safetensors(
        directory / "model.safetensors",
        {hf_name("opt", n).removeprefix("model."): file.load(n) for n in file.names()},
    )
    write_json(directory / "config.json", config_of(shape))
    convert(directory, tmp_path / "out.gguf", "Q4_0")
    found = GgufTensors(tmp_path / "out.gguf")
    assert found.tensor_type("blk.0.ffn_down.weight") == "F16"
    assert found.tensor_type("blk.0.ffn_up.weight") == "Q4_0"
    assert found.tensor_type("position_embd.weight") == "F32"


# --- configurations --------------------------------------------------------------------------


def test_newer_rope_parameters_mean_the_same(tmp_path):
    shape = make_tiny_model(tmp_path / "m.gguf", **MODELS["gemma3"])
    config = config_of(shape)
    old = shape_from_config(config)
    for key in ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern"):
        del config[key]
    config["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config["layer_types"] = ["sliding_attention"] * 5 + ["full_attention"]
    assert shape_from_config(config) == old == shape


@pytest.mark.parametrize("arch", ["gemma", "gemma2", "minicpm", "smollm3", "llama"])
def test_a_configuration_that_is_silent_about_a_tied_head(tmp_path, arch):
    """Has what its class in transformers (or MiniCPM's own) has."""
    config = config_of(make_tiny_model(tmp_path / "m.gguf", **MODELS[arch]))
    del config["tie_word_embeddings"]
    assert shape_from_config(config).tied == (arch != "llama")


def test_smollm3_has_a_rope_base_of_its_own(tmp_path):
    config = config_of(make_tiny_model(tmp_path / "m.gguf", **MODELS["smollm3"]))
    del config["rope_theta"]
    assert shape_from_config(config).rope_freq_base == 2e6


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"original_context_length": 32}),  # all that the model was trained for
        ({"original_max_position_embeddings": 8}, {"original_context_length": 8}),
        (
            {"beta_fast": 16, "beta_slow": 2, "mscale": None},
            {"original_context_length": 32, "yarn_beta_fast": 16, "yarn_beta_slow": 2},
        ),
        (
            {"attention_factor": 1.5},  # in place of 0.1 ln 4 + 1
            {"original_context_length": 32, "attn_factor": 1.5 / 1.1386294361119891},
        ),
        (
            {"mscale": 0.5, "mscale_all_dim": 2.0},
            {
                "original_context_length": 32,
                "attn_factor": 1.0693147180559945 / 1.2772588722239782 / 1.1386294361119891,
            },
        ),
    ],
)
def test_yarn_parameters_become_those_of_gguf(tmp_path, fields, expected):
    shape = make_tiny_model(tmp_path / "m.gguf", **MODELS["qwen2"] | {"rope_scaling": None})
    config = config_of(shape) | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0} | fields}
    scaling = shape_from_config(config).rope_scaling
    assert scaling.pop("type") == "yarn" and scaling.pop("factor") == 4.0
    assert scaling == pytest.approx(expected)


def test_sliding_window_of_mistral_bounds_the_context():
    config = {
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
    }
    assert shape_from_config(config).n_ctx == 4096
    assert shape_from_config(config | {"sliding_window": None}).n_ctx == 32768
    assert shape_from_config(config | {"use_sliding_window": False}).n_ctx == 32768


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({}, None),
        ({"hidden_act": "relu"}, "relu"),  # SparseLLM/ReluLLaMA
        (
            {
                "architectures": ["SparseLlamaForCausalLM"],
                "hidden_act": "fatrelu",
                "hidden_act_param": 0.01,
            },
            "fatrelu:0.01",
        ),
        ({"architectures": ["BambooForCausalLM"], "hidden_act": "relu"}, "drelu"),
    ],
)
def test_the_activation_of_sparse_models_is_kept(changes, activation, tmp_path):
    directory, _, shape = make_directory(tmp_path, "llama")
    change_json(directory / "config.json", **changes)
    out = tmp_path / "out.gguf"
    assert convert(directory, out, "F32") == replace(shape, activation=activation)
    assert _core.Engine(str(out)).config["activation"] == (activation or "silu")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ("llama", {"architectures": None}, "none"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"hidden_act": "fatrelu"}, "hidden_act_param is missing"),
        ("llama", {"architectures": ["BambooForCausalLM"], "hidden_act": "silu"}, "hidden_act"),
        ("qwen2", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        ("phi3", {"attention_bias": True}, "attention_bias"),
        ("gemma2", {"attention_bias": True}, "attention_bias"),
        ("olmo2", {"attention_bias": True}, "attention_bias"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ("phi3", {"rope_scaling": {"type": "su", "long_factor": [1.0]}}, "short_factor is missing"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ("qwen2", {"rope_scaling": YARN | {"truncate": False}}, "truncate is False"),
        ("gemma2", {"rope_scaling": YARN}, "'yarn' does not exist for gemma2"),
        (
            "minicpm",  # MiniCPM 4
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 16,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                }
            },
            "'longrope' does not exist for minicpm",
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ("opt", {"activation_function": "gelu"}, "activation_function"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 0]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layer_interval": 5}, "no_rope_layer_interval"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is None"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
        ("gemma2", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"sliding_window_pattern": 4}, "sliding_window_pattern"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "layer_types"),
        ("gemma3", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar"),
        ("gemma3", {"rope_local_base_freq": 5e5}, "local layers"),
    ],
)
def test_unsupported_configs_name_the_field(name, changes, message, tmp_path):
    shape = make_tiny_model(tmp_path / "m.gguf", **MODELS[name])
    with pytest.raises(CheckpointError, match=message):
        shape_from_config(config_of(shape) | changes)


# --- directories that cannot be converted ----------------------------------------------------


def first_file(directory: Path) -> Path:
    return directory / "model-00001-of-00002.safetensors"


def cut_short(directory: Path) -> None:
    path = first_file(directory)
    path.write_bytes(path.read_bytes()[:-100])


def change_vocabulary(directory: Path, **changes: Any) -> None:
    change_json(directory / "tokenizer.json", **changes)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json: not found"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda d: [f.unlink() for f in d.glob("*.safetensors")], "no .*safetensors"),
        (lambda d: first_file(d).unlink(), "embed_tokens.weight is missing"),
        (
            lambda d: write_safetensors(d / "extra.safetensors", {"model.adapter": np.ones(3)}),
            "not part of a qwen2 model, e.g. model.adapter",
        ),
        (
            lambda d: write_safetensors(d / "z.safetensors", {"model.norm.weight": np.ones(3)}),
            r"model.norm.weight has shape \(3,\), expected \(64,\)",
        ),
        (cut_short, "cut short"),
        (lambda d: first_file(d).write_bytes(b"\xff" * 64), "not a safetensors file"),
        (lambda d: first_file(d).write_bytes(b"\x04" + bytes(7) + b"{{{{"), "header is not JSON"),
        (lambda d: first_file(d).write_bytes(b""), "not a safetensors file"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: not found"),
        (lambda d: change_vocabulary(d, model={"type": "WordPiece"}), "WordPiece"),
        (lambda d: change_vocabulary(d, pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (
            lambda d: change_vocabulary(
                d, added_tokens=[{"id": 272, "content": "x", "special": True}]
            ),
            "272 has no embedding",
        ),
    ],
)
def test_broken_directories_are_explained_and_leave_no_file(harm, message, tmp_path):
    directory, _, _ = make_directory(tmp_path, "qwen2")
    harm(directory)
    with pytest.raises(CheckpointError, match=message):
        convert(directory, tmp_path / "out.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "original.gguf"]


def test_command_line(tmp_path, capsys, monkeypatch):
    directory, _, _ = make_directory(tmp_path, "opt")
    monkeypatch.chdir(tmp_path)
    assert main([str(directory), "--outtype", "q8_0"]) == 0
    assert "opt, 2 layers" in capsys.readouterr().out
    assert (tmp_path / "model-q8_0.gguf").is_file()
    assert main([str(tmp_path / "nothing")]) == 1
    assert "config.json: not found" in capsys.readouterr().err
    assert main([str(directory), "--out", str(tmp_path / "no" / "x.gguf")]) == 1
    assert "x.gguf" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([str(directory), "--outtype", "q4_k"])
    assert stop.value.code == 2


# --- tokenizers ------------------------------------------------------------------------------

L3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|"
    r"'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("normalizer", "steps", "name"),
    [
        (None, [BYTE_LEVEL], "gpt-2"),
        (None, [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL], "smollm"),
        (
            None,
            [{"type": "Split", "pattern": {"Regex": L3}}, BYTE_LEVEL | {"use_regex": False}],
            "llama-bpe",
        ),
        (
            None,
            [{"type": "Split", "pattern": {"Regex": O200K}}, BYTE_LEVEL | {"use_regex": False}],
            "gpt-4o",
        ),
        (
            None,
            [{"type": "Split", "pattern": {"Regex": L3}}, BYTE_LEVEL | {"use_regex": False}],
            "smaug-bpe",
        ),
        (
            {"type": "NFC"},
            [
                {"type": "Split", "pattern": {"Regex": L3.replace("{1,3}", "")}},
                BYTE_LEVEL | {"use_regex": False},
            ],
            "qwen2",
        ),
    ],
)
def test_pre_tokenizers_are_recognised(normalizer, steps, name, tmp_path):
    directory, _, shape = make_directory(tmp_path, "opt")
    model = tokenizer_json(shape.n_vocab)["model"] | {"ignore_merges": name == "llama-bpe"}
    change_vocabulary(
        directory,
        normalizer=normalizer,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        model=model,
    )
    convert(directory, tmp_path / "out.gguf")
    assert GgufTensors(tmp_path / "out.gguf").field("tokenizer.ggml.pre") == name


def test_sentencepiece_vocabulary_gets_types_and_scores(tmp_path):
    directory, _, _ = make_directory(tmp_path, "opt")
    tokens = ["<unk>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581ab", "\n\n"]
    change_vocabulary(
        directory,
        pre_tokenizer=None,
        post_processor=None,
        added_tokens=[
            {"id": 0, "content": "<unk>", "special": True},
            {"id": 1, "content": "</s>", "special": True},
            {"id": 8, "content": "\n\n", "special": False},
        ],
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        model={
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": [["a", "b"], ["\u2581", "ab"]],
        },
    )
    write_json(
        directory / "tokenizer_config.json",
        {"eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
    )
    change_json(directory / "config.json", bos_token_id=1)
    convert(directory, tmp_path / "out.gguf")
    file = GgufTensors(tmp_path / "out.gguf")
    assert file.field("tokenizer.ggml.model") == "llama"
    assert file.field("tokenizer.ggml.tokens")[:10] == [*tokens, "[PAD9]"]
    assert file.field("tokenizer.ggml.token_type")[:10] == [2, 3, 6, 1, 1, 1, 1, 1, 4, 5]
    assert file.field("tokenizer.ggml.scores")[:9] == [-2, -2, -2, -2, -2, -2, 0, -1, -2]
    assert file.field("tokenizer.ggml.add_space_prefix") is True
    assert file.field("tokenizer.ggml.add_bos_token") is True
    assert [file.field(f"tokenizer.ggml.{k}_token_id") for k in ("unknown", "bos", "eos")] == [
        0,
        1,
        1,
    ]


# --- a model that was really trained ---------------------------------------------------------


def test_opt_books_converts_and_equals_transformers(shared_dir, tmp_path):
    directory = shared_dir / "models" / "opt-books-17m"
    if not directory.is_dir():
        pytest.skip("opt-books-17m is not among the reference models")
    convert(directory, tmp_path / "out.gguf", "F32")
    model = ReferenceModel(tmp_path / "out.gguf")
    assert model.file.field("tokenizer.ggml.pre") == "gpt-2"
    assert model.file.field("tokenizer.ggml.tokens")[2] == "</s>"
    assert model.file.field("tokenizer.ggml.bos_token_id") == 2
    assert model.file.field("tokenizer.ggml.add_bos_token") is True
    golden = np.load(Path(__file__).parent / "golden" / "opt_books_logits.npz")
    result = model.forward(golden["tokens"])
    logits = result.logits[golden["positions"]]
    top = np.argsort(-logits, axis=-1, kind="stable")[:, :20]
    assert np.array_equal(top, golden["top_ids"])
    # float64 on both sides, stored as float32 of values up to 16
    np.testing.assert_allclose(
        np.take_along_axis(logits, top, axis=-1), golden["top_logits"], rtol=0, atol=2e-6
    )
    active = (result.h[1:] > 0).mean()
    assert 0.02 < active < 0.15  # real ReLU sparsity
