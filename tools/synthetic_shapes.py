"""The shapes of synthetic models: a tiny one of each architecture, and of llama with ReLU, and the
papers' real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model_shape import ModelShape

TINY = {
    "llama": ModelShape("llama", 3, 256, 512, 4, 2, 64, 320, 256),
    "qwen2": ModelShape(
        "qwen2", 2, 256, 768, 8, 2, 32, 400, 256, tied=True, rope_freq_base=1e6, norm_eps=1e-6
    ),
    "qwen3": ModelShape(
        "qwen3", 2, 256, 512, 4, 2, 128, 384, 256, rope_freq_base=1e6, norm_eps=1e-6
    ),
    "gemma": ModelShape("gemma", 2, 256, 512, 4, 1, 128, 352, 256, tied=True, norm_eps=1e-6),
    "gemma2": ModelShape(
        "gemma2",
        4,
        256,
        512,
        4,
        2,
        128,
        352,
        256,
        tied=True,
        norm_eps=1e-6,
        sliding_window=8,
        attn_softcap=20.0,
        final_softcap=15.0,
    ),
    "gemma3": ModelShape(
        "gemma3",
        7,
        256,
        512,
        4,
        1,
        128,
        352,
        256,
        tied=True,
        rope_freq_base=1e6,
        norm_eps=1e-6,
        sliding_window=8,
    ),
    "phi3": ModelShape(
        "phi3",
        3,
        256,
        512,
        4,
        2,
        64,
        336,
        256,
        sliding_window=16,
        rope_dim=48,
        rope_scaling={
            "type": "longrope",
            "original_context_length": 64,
            "attn_factor": 1.2,
            "short_factor": [1.0 + 0.05 * i for i in range(24)],
            "long_factor": [1.0 + 0.5 * i for i in range(24)],
        },
    ),
    "granite": ModelShape(
        "granite",
        3,
        256,
        512,
        4,
        2,
        64,
        352,
        256,
        embedding_scale=2.0,
        residual_scale=0.5,
        attention_scale=0.1,
        logit_scale=0.75,
    ),
    "minicpm": ModelShape(
        "minicpm",
        3,
        256,
        512,
        4,
        2,
        64,
        352,
        256,
        activation="fatrelu:0.1",
        embedding_scale=2.0,
        residual_scale=0.8,
        logit_scale=0.8,
    ),
    "smollm3": ModelShape("smollm3", 5, 256, 512, 4, 2, 64, 352, 256, tied=True),
    "olmo2": ModelShape("olmo2", 3, 256, 512, 4, 2, 64, 352, 256),
    "opt": ModelShape("opt", 3, 256, 1024, 4, 4, 64, 336, 256, tied=True),
}
TINY["llama-relu"] = replace(TINY["llama"], activation="relu")
LLAMA31_SCALING = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context_length": 8192,
}
PAPER = {
    "llama2-7b": ModelShape("llama", 32, 4096, 11008, 32, 32, 128, 32000, 4096),
    "llama2-70b": ModelShape("llama", 80, 8192, 28672, 64, 8, 128, 32000, 4096),
    "llama3.1-8b": ModelShape(
        "llama",
        32,
        4096,
        14336,
        32,
        8,
        128,
        128256,
        131072,
        rope_freq_base=5e5,
        rope_scaling=LLAMA31_SCALING,
    ),
    "opt-6.7b": ModelShape("opt", 32, 4096, 16384, 32, 32, 128, 50272, 2048, tied=True),
    "opt-13b": ModelShape("opt", 40, 5120, 20480, 40, 40, 128, 50272, 2048, tied=True),
    "opt-66b": ModelShape("opt", 64, 9216, 36864, 72, 72, 128, 50272, 2048, tied=True),
    "qwen2.5-7b": ModelShape(
        "qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 32768, rope_freq_base=1e6, norm_eps=1e-6
    ),
    "smollm2-135m": ModelShape(
        "llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, tied=True, rope_freq_base=1e5
    ),
}


def tiny_shape(arch: str, **overrides: Any) -> ModelShape:
    """The tiny shape of an architecture with fields replaced; unknown fields are a ValueError."""
    if arch not in TINY:
        raise ValueError(f"arch must be one of {', '.join(TINY)}, got {arch!r}")
    unknown = sorted(set(overrides) - set(ModelShape.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"unknown shape field {unknown[0]!r}; known: "
            f"{', '.join(ModelShape.__dataclass_fields__)}"
        )
    if "n_embd" in overrides and "head_dim" not in overrides:
        n_head = overrides.get("n_head", TINY[arch].n_head)
        overrides["head_dim"] = overrides["n_embd"] // n_head
    if arch == "opt" and "n_head" in overrides:
        overrides.setdefault("n_head_kv", overrides["n_head"])
    return replace(TINY[arch], **overrides).check()
