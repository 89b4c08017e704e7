"""Hugging Face's architectures in GGUF's terms: config.json -> ModelShape, tensor names, and the
two changes of values (the rotary row order of llama and its kin, Gemma's norms as 1 + w). Nothing
here does IO.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from hf_checkpoint import CheckpointError
from model_shape import GEMMA, INTERLEAVED, MLP_BIAS, ModelShape

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "GraniteForCausalLM": "granite",
    "MiniCPMForCausalLM": "minicpm",
    "SmolLM3ForCausalLM": "smollm3",
    "Olmo2ForCausalLM": "olmo2",
    "OPTForCausalLM": "opt",
    "SparseLlamaForCausalLM": "llama",  # ProSparse's own code: Llama with FATReLU
    "BambooForCausalLM": "llama",  # Bamboo's and TurboSparse's own code: Mistral with dReLU
}
_ROTARY = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_POST_NORMS = _ROTARY | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = _ROTARY | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_OPT = {
    "token_embd": "model.decoder.embed_tokens",
    "position_embd": "model.decoder.embed_positions",
    "output_norm": "model.decoder.final_layer_norm",
    "output": "lm_head",
    "attn_norm": "self_attn_layer_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn_up": "fc1",
    "ffn_down": "fc2",
}
_NAMES = {
    "gemma2": _POST_NORMS,
    "gemma3": _POST_NORMS,
    "phi3": _PHI3,
    "olmo2": _POST_NORMS,
    "opt": _OPT,
}
# What a config.json may leave out, and what it then means, where others mean something else.
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
}
_GEMMA3_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "vocab_size": 262208,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
_DEFAULTS = {
    "gemma": _GEMMA_DEFAULTS,
    "gemma2": _GEMMA2_DEFAULTS,
    "gemma3": _GEMMA3_DEFAULTS,
    "minicpm": {"tie_word_embeddings": True},
    "smollm3": {"tie_word_embeddings": True, "rope_theta": 2e6},
}
# May have biases on q, k, v and output (those of qwen2 on q, k and v are not a choice).
_ATTENTION_BIAS = ("llama", "qwen3", "gemma3", "granite", "minicpm", "smollm3")
GLOBAL_EVERY = {"gemma2": 2, "gemma3": 6}
GEMMA3_LOCAL_ROPE_BASE = 10000.0
SMOLLM3_NO_ROPE_EVERY = 4
LAYERS_27B = {"gemma2": 46, "gemma3": 62}


def hf_name(arch: str, name: str) -> str:
    """Hugging Face's name of a GGUF tensor: blk.3.ffn_up.weight -> model.layers.3.mlp..."""
    names = _NAMES.get(arch, _ROTARY)
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        raise ValueError(f"{name!r} is not a GGUF tensor name")
    layer, base, suffix = match.groups()
    if layer is None:
        return f"{names[base]}.{suffix}"
    stem = "model.decoder.layers" if arch == "opt" else "model.layers"
    return f"{stem}.{layer}.{names[base]}.{suffix}"


def _rotated_heads(shape: ModelShape, name: str) -> int | None:
    """Heads of a tensor whose rows change order: llama rotates neighbouring rows, not halves."""
    if shape.arch not in INTERLEAVED:
        return None
    return {"attn_q": shape.n_head, "attn_k": shape.n_head_kv}.get(name.split(".")[-2])


def to_gguf_values(shape: ModelShape, name: str, values: np.ndarray) -> np.ndarray:
    """Values of tensor `name` (GGUF's) as a GGUF file holds them, from Hugging Face's."""
    if n_head := _rotated_heads(shape, name):
        halves = values.reshape(n_head, 2, shape.head_dim // 2, -1)
        return halves.swapaxes(1, 2).reshape(values.shape)
    if shape.arch in GEMMA and name.endswith("norm.weight"):
        return values + np.float32(1)
    return values


def from_gguf_values(shape: ModelShape, name: str, values: np.ndarray) -> np.ndarray:
    """The inverse of `to_gguf_values`."""
    if n_head := _rotated_heads(shape, name):
        pairs = values.reshape(n_head, shape.head_dim // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(values.shape)
    if shape.arch in GEMMA and name.endswith("norm.weight"):
        return values - np.float32(1)
    return values


def shape_from_config(config: dict[str, Any]) -> ModelShape:
    """The model's shape; CheckpointError names the field of config.json that is not supported."""
    names = config.get("architectures") or ["(none)"]
    if names[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"config.json: architecture {names[0]} is not supported, expected "
            f"one of {', '.join(ARCHITECTURES)}"
        )
    arch = ARCHITECTURES[names[0]]
    config = _DEFAULTS.get(arch, {}) | config
    try:
        shape = _opt_shape(config) if arch == "opt" else _rotary_shape(arch, config)
    except KeyError as error:
        raise CheckpointError(f"config.json: {error.args[0]} is missing") from None
    try:
        return shape.check()
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None


def _expect(config: dict[str, Any], key: str, *allowed: Any) -> None:
    """`allowed[0]` is also what an absent field means."""
    if config.get(key, allowed[0]) not in allowed:
        raise CheckpointError(
            f"config.json: {key} is {config[key]!r}, supported: "
            f"{', '.join(repr(a) for a in allowed)}"
        )


def _opt_shape(config: dict[str, Any]) -> ModelShape:
    for key, value in (
        ("activation_function", "relu"),
        ("do_layer_norm_before", True),
        ("enable_bias", True),
        ("layer_norm_elementwise_affine", True),
        ("_remove_final_layer_norm", False),
        ("tie_word_embeddings", True),
        ("word_embed_proj_dim", config["hidden_size"]),
    ):
        _expect(config, key, value)
    n_head = config["num_attention_heads"]
    return ModelShape(
        "opt",
        config["num_hidden_layers"],
        config["hidden_size"],
        config["ffn_dim"],
        n_head,
        n_head,
        config["hidden_size"] // n_head,
        config["vocab_size"],
        config["max_position_embeddings"],
        tied=True,
    )


def _rotary_shape(arch: str, config: dict[str, Any]) -> ModelShape:
    gemma3, phi3 = arch == "gemma3", arch == "phi3"
    windowed = arch in GLOBAL_EVERY
    activation = _activation(arch, config)
    if arch not in _ATTENTION_BIAS:
        _expect(config, "attention_bias", False)
    if arch not in MLP_BIAS:
        _expect(config, "mlp_bias", False)
    n_head, n_embd, n_ctx = (
        config["num_attention_heads"],
        config["hidden_size"],
        config["max_position_embeddings"],
    )
    head_dim = config.get("head_dim") or n_embd // n_head
    rope = _rope_parameters(config)
    window = config.get("sliding_window")
    if arch == "smollm3":
        _check_smollm3(config)
    if windowed:
        _check_windows(arch, config, head_dim)
    if gemma3:
        _check_gemma3(config, rope)
        rope = rope.get("full_attention", rope)
    elif windowed:
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not config[key]:
                raise CheckpointError(f"config.json: {key} is {config[key]!r}, expected a number")
    elif window and config.get("use_sliding_window", arch != "smollm3") and not phi3:
        n_ctx, window = min(n_ctx, window), None  # up to there the window hides nothing
    rotated = head_dim
    if phi3:
        part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        rotated = int(head_dim * part)
    return ModelShape(
        arch,
        config["num_hidden_layers"],
        n_embd,
        config["intermediate_size"],
        n_head,
        config.get("num_key_value_heads") or n_head,
        head_dim,
        config["vocab_size"],
        n_ctx,
        tied=config.get("tie_word_embeddings", False),
        rope_freq_base=rope.get("rope_theta", 10000.0),
        norm_eps=config["rms_norm_eps"],
        rope_scaling=_rope_scaling(rope, config),
        sliding_window=window if windowed or phi3 else None,
        rope_dim=rotated if rotated != head_dim else None,
        attention_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
        attn_softcap=config["attn_logit_softcapping"] if arch == "gemma2" else None,
        final_softcap=config["final_logit_softcapping"] if arch == "gemma2" else None,
        activation=activation,
        **_scales(arch, config),
    )


def _scales(arch: str, config: dict[str, Any]) -> dict[str, float]:
    """ModelShape's factors, where the architecture has them."""
    if arch == "minicpm":
        return {
            "embedding_scale": config["scale_emb"],
            "residual_scale": config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
            "logit_scale": config["hidden_size"] / config["dim_model_base"],
        }
    if arch != "granite":
        return {}
    return {  # what a config.json leaves out is 1, also the scale of attention
        "embedding_scale": config.get("embedding_multiplier", 1.0),
        "residual_scale": config.get("residual_multiplier", 1.0),
        "attention_scale": config.get("attention_multiplier", 1.0),
        "logit_scale": config.get("logits_scaling", 1.0),
    }


def _activation(arch: str, config: dict[str, Any]) -> str | None:
    """ModelShape's `activation`: models made sparse have others than their architecture's own."""
    if arch in GEMMA:
        _expect(config, "hidden_activation", "gelu_pytorch_tanh", *[None] * (arch == "gemma"))
        if arch == "gemma":  # whose first files say "gelu" and mean the other
            _expect(config, "hidden_act", "gelu_pytorch_tanh", "gelu")
        return None
    if "BambooForCausalLM" in config["architectures"]:
        _expect(config, "hidden_act", "relu")
        return "drelu"
    _expect(config, "hidden_act", "silu", "relu", "fatrelu")
    name = config.get("hidden_act", "silu")
    if name == "fatrelu":
        return f"fatrelu:{float(config['hidden_act_param'])!r}"
    return None if name == "silu" else name


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Newer configs have rope_parameters; older ones rope_theta and rope_scaling."""
    if config.get("rope_parameters"):
        return config["rope_parameters"]
    return {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}


def _rope_scaling(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return {"type": "linear", "factor": rope["factor"]}
    if kind == "llama3":
        return {
            "type": "llama3",
            "factor": rope["factor"],
            "low_freq_factor": rope["low_freq_factor"],
            "high_freq_factor": rope["high_freq_factor"],
            "original_context_length": rope["original_max_position_embeddings"],
        }
    if "long_factor" in rope:  # phi3's, under several names
        return _longrope(rope, config)
    if kind == "yarn":
        return _yarn(rope, config["max_position_embeddings"])
    raise CheckpointError(
        f"config.json: rope scaling {kind!r} is not supported, expected default, linear, yarn, "
        "llama3 or (with long_factor and short_factor) longrope"
    )


def _longrope(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    key = "original_max_position_embeddings"
    original = rope[key] if key in rope else config[key]
    factor = config["max_position_embeddings"] / original
    computed = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "type": "longrope",
        "original_context_length": original,
        "attn_factor": rope.get("attention_factor") or computed,
        "short_factor": rope["short_factor"],
        "long_factor": rope["long_factor"],
    }


def _yarn(rope: dict[str, Any], n_ctx: int) -> dict[str, Any]:
    """A GGUF has a factor beside the one that follows from YaRN's, where transformers has one in
    its place or works it out with other weights."""
    _expect(rope, "truncate", True)

    def magnitude(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    wanted = rope.get("attention_factor")
    if wanted is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        wanted = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    scaling = {
        "type": "yarn",
        "factor": rope["factor"],
        "original_context_length": rope.get("original_max_position_embeddings", n_ctx),
        "yarn_beta_fast": rope.get("beta_fast"),
        "yarn_beta_slow": rope.get("beta_slow"),
        "attn_factor": wanted and wanted / magnitude(),
    }
    return {key: value for key, value in scaling.items() if value}


def _check_smollm3(config: dict[str, Any]) -> None:
    _expect(config, "no_rope_layer_interval", SMOLLM3_NO_ROPE_EVERY)
    rotated = [
        int((i + 1) % SMOLLM3_NO_ROPE_EVERY != 0) for i in range(config["num_hidden_layers"])
    ]
    _expect(config, "no_rope_layers", rotated, None)


def _check_windows(arch: str, config: dict[str, Any], head_dim: int) -> None:
    n_layer = config["num_hidden_layers"]
    _expect(
        config,
        "query_pre_attn_scalar",
        config["hidden_size"] // config["num_attention_heads"]
        if n_layer == LAYERS_27B[arch]
        else head_dim,
    )
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        _expect(config, key, GLOBAL_EVERY[arch])
    pattern = [
        "full_attention" if (i + 1) % GLOBAL_EVERY[arch] == 0 else "sliding_attention"
        for i in range(n_layer)
    ]
    _expect(config, "layer_types", pattern, None)


def _check_gemma3(config: dict[str, Any], rope: dict[str, Any]) -> None:
    _expect(config, "final_logit_softcapping", None)
    _expect(config, "attn_logit_softcapping", None)
    local = rope.get("sliding_attention", {})
    base = local.get("rope_theta", config.get("rope_local_base_freq", GEMMA3_LOCAL_ROPE_BASE))
    if base != GEMMA3_LOCAL_ROPE_BASE or local.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"config.json: the local layers' rotary base is {base}, supported: "
            f"{GEMMA3_LOCAL_ROPE_BASE} without scaling"
        )
