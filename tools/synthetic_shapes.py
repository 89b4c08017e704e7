"""Shapes of synthetic models: which tensors and which metadata each architecture has.

`ModelShape` is plain data; `tensor_specs` and `metadata` derive from it what llama.cpp's own
converter would write for that architecture (`opt`, which llama.cpp lacks, follows its habits).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from synthetic_vocab import Vocabulary

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "opt")
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9,
              "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25,
              "IQ4_XS": 30, "BF16": 32}  # general.file_type
QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class ModelShape:
    """Every number that decides a model's tensors and metadata, in GGUF's words."""

    arch: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx: int
    tied: bool = False
    rope_freq_base: float = 10000.0
    norm_eps: float = 1e-5
    # {"type": "linear", "factor": f}, or {"type": "llama3", "factor", "low_freq_factor",
    # "high_freq_factor", "original_context_length"} (llama only: stored as rope_freqs.weight)
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = None  # gemma3's local layers
    pre: str = "gpt-2"  # tokenizer.ggml.pre

    @property
    def gated(self) -> bool:
        """Whether the FFN is act(gate) * up rather than act(fc1)."""
        return self.arch != "opt"

    def check(self) -> ModelShape:
        """This shape, or ValueError that names the field at fault."""
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {self.arch!r}")
        if self.n_head % self.n_head_kv:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_head_kv "
                             f"({self.n_head_kv})")
        if self.head_dim % 2 and self.arch != "opt":
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.arch == "opt" and not self.tied:
            raise ValueError("opt has a tied head: tied must be True")
        kind = self.rope_scaling and self.rope_scaling["type"]
        allowed = {"llama": (None, "linear", "llama3"), "opt": (None,)}
        if kind not in allowed.get(self.arch, (None, "linear")):
            raise ValueError(f"rope_scaling type {kind!r} does not exist for {self.arch}")
        return self


TINY = {
    "llama": ModelShape("llama", 3, 256, 512, 4, 2, 64, 320, 256),
    "qwen2": ModelShape("qwen2", 2, 256, 768, 8, 2, 32, 400, 256, tied=True,
                        rope_freq_base=1e6, norm_eps=1e-6),
    "qwen3": ModelShape("qwen3", 2, 256, 512, 4, 2, 128, 384, 256, rope_freq_base=1e6,
                        norm_eps=1e-6),
    "gemma3": ModelShape("gemma3", 7, 256, 512, 4, 1, 128, 352, 256, tied=True,
                         rope_freq_base=1e6, norm_eps=1e-6, sliding_window=8),
    "opt": ModelShape("opt", 3, 256, 1024, 4, 4, 64, 336, 256, tied=True),
}
LLAMA31_SCALING = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_context_length": 8192}
PAPER = {
    "llama2-7b": ModelShape("llama", 32, 4096, 11008, 32, 32, 128, 32000, 4096),
    "llama3.1-8b": ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072,
                              rope_freq_base=5e5, rope_scaling=LLAMA31_SCALING),
    "opt-6.7b": ModelShape("opt", 32, 4096, 16384, 32, 32, 128, 50272, 2048, tied=True),
    "opt-13b": ModelShape("opt", 40, 5120, 20480, 40, 40, 128, 50272, 2048, tied=True),
    "qwen2.5-7b": ModelShape("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 32768,
                             rope_freq_base=1e6, norm_eps=1e-6),
    "smollm2-135m": ModelShape("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, tied=True,
                               rope_freq_base=1e5),
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: `shape` is (rows, columns) or (n,), and float values are drawn by `kind`.

    kind "matrix" has values of standard deviation `scale` and takes the model's tensor type; the
    others are always F32: "norm" is `center` + noise, "bias" and "table" are noise of that
    deviation, "rope_factors" is computed.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    scale: float
    center: float = 0.0


def tensor_specs(shape: ModelShape) -> list[TensorSpec]:
    """All tensors in file order. Scales keep activations near 1 and logits a few units apart."""
    n_embd, n_ff, n_vocab = shape.n_embd, shape.n_ff, shape.n_vocab
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    opt, gemma3 = shape.arch == "opt", shape.arch == "gemma3"
    specs: list[TensorSpec] = []

    def matrix(name: str, rows: int, columns: int, gain: float) -> None:
        specs.append(TensorSpec(f"{name}.weight", (rows, columns), "matrix",
                                gain / math.sqrt(columns)))

    def bias(name: str, n: int, scale: float) -> None:
        specs.append(TensorSpec(f"{name}.bias", (n,), "bias", scale))

    def norm(name: str, n: int, center: float = 1.0) -> None:
        specs.append(TensorSpec(f"{name}.weight", (n,), "norm", 0.1 * center, center))
        if opt:
            bias(name, n, 0.1)

    # A tied head would repeat the last token for ever if its row were large in the residual
    # stream: there the embedding is small and the last norm makes up for it.
    embd_gain = 3.0 if not shape.tied else 0.4 if gemma3 else 1.0
    matrix("token_embd", n_vocab, n_embd, embd_gain)
    if opt:
        specs.append(TensorSpec("position_embd.weight", (shape.n_ctx + 2, n_embd), "table", 0.05))
    norm("output_norm", n_embd, 3.0 / embd_gain)
    if not shape.tied:
        matrix("output", n_vocab, n_embd, 3.0)
    if shape.rope_scaling and shape.rope_scaling["type"] == "llama3":
        specs.append(TensorSpec("rope_freqs.weight", (shape.head_dim // 2,), "rope_factors", 0.0))
    for i in range(shape.n_layer):
        blk = f"blk.{i}"
        norm(f"{blk}.attn_norm", n_embd)
        for name, rows, gain in (("q", n_q, 1.4), ("k", n_kv, 1.4), ("v", n_kv, 1.0)):
            matrix(f"{blk}.attn_{name}", rows, n_embd, gain)
            if opt or shape.arch == "qwen2":
                bias(f"{blk}.attn_{name}", rows, 0.3)
        if shape.arch in ("qwen3", "gemma3"):
            norm(f"{blk}.attn_q_norm", shape.head_dim)
            norm(f"{blk}.attn_k_norm", shape.head_dim)
        matrix(f"{blk}.attn_output", n_embd, n_q, 1.0)
        if opt:
            bias(f"{blk}.attn_output", n_embd, 0.1)
        if gemma3:
            norm(f"{blk}.post_attention_norm", n_embd)
        norm(f"{blk}.ffn_norm", n_embd)
        if shape.gated:
            matrix(f"{blk}.ffn_gate", n_ff, n_embd, 1.0)
        matrix(f"{blk}.ffn_up", n_ff, n_embd, 1.0)
        if opt:
            bias(f"{blk}.ffn_up", n_ff, 0.3)
        matrix(f"{blk}.ffn_down", n_embd, n_ff, 2.0)
        if opt:
            bias(f"{blk}.ffn_down", n_embd, 0.1)
        if gemma3:
            norm(f"{blk}.post_ffw_norm", n_embd)
    return specs


def rope_factors(shape: ModelShape) -> np.ndarray:
    """Llama 3.1's frequency divisors, float32 (head_dim / 2,): 1 for short waves, `factor` for
    waves longer than the original context, a blend between."""
    scaling = shape.rope_scaling
    if scaling is None:
        raise ValueError("rope_factors needs a shape with rope_scaling of type llama3")
    pair = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    turns = scaling["original_context_length"] / (2 * math.pi * shape.rope_freq_base**pair)
    low, high, factor = (scaling["low_freq_factor"], scaling["high_freq_factor"],
                         scaling["factor"])
    smooth = (turns - low) / (high - low)  # turns within the original context: 0 slow .. 1 fast
    blend = 1.0 / ((1 - smooth) / factor + smooth)
    return np.where(turns > high, 1.0, np.where(turns < low, factor, blend)).astype(np.float32)


def metadata(shape: ModelShape, vocabulary: Vocabulary, file_type: str,
             name: str) -> dict[str, Any]:
    """Key -> value; bool, int (uint32), float (float32), str, or a list of str or int32."""
    arch = shape.arch
    rotary = arch != "opt"
    out: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        f"{arch}.block_count": shape.n_layer,
        f"{arch}.context_length": shape.n_ctx,
        f"{arch}.embedding_length": shape.n_embd,
        f"{arch}.feed_forward_length": shape.n_ff,
        f"{arch}.attention.head_count": shape.n_head,
        f"{arch}.attention.head_count_kv": shape.n_head_kv,
    }
    if arch in ("qwen3", "gemma3") or shape.head_dim * shape.n_head != shape.n_embd:
        out[f"{arch}.attention.key_length"] = shape.head_dim
        out[f"{arch}.attention.value_length"] = shape.head_dim
    norm_kind = "layer_norm_rms_epsilon" if rotary else "layer_norm_epsilon"
    out[f"{arch}.attention.{norm_kind}"] = float(shape.norm_eps)
    if rotary:
        out[f"{arch}.rope.freq_base"] = float(shape.rope_freq_base)
    if arch == "llama":
        out["llama.rope.dimension_count"] = shape.head_dim
        out["llama.vocab_size"] = shape.n_vocab
    if shape.rope_scaling and shape.rope_scaling["type"] == "linear":
        out[f"{arch}.rope.scaling.type"] = "linear"
        out[f"{arch}.rope.scaling.factor"] = float(shape.rope_scaling["factor"])
    if shape.sliding_window:
        out[f"{arch}.attention.sliding_window"] = shape.sliding_window
    out |= {
        "general.file_type": FILE_TYPES[file_type],
        "general.quantization_version": QUANTIZATION_VERSION,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": shape.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.token_types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": vocabulary.bos_id,
        "tokenizer.ggml.eos_token_id": vocabulary.eos_id,
        "tokenizer.ggml.padding_token_id": vocabulary.pad_id,
        "tokenizer.ggml.add_bos_token": arch in ("gemma3", "opt"),
    }
    return out


def tiny_shape(arch: str, **overrides: Any) -> ModelShape:
    """The tiny shape of an architecture with fields replaced; unknown fields are a ValueError."""
    if arch not in TINY:
        raise ValueError(f"arch must be one of {', '.join(TINY)}, got {arch!r}")
    unknown = sorted(set(overrides) - set(ModelShape.__dataclass_fields__))
    if unknown:
        raise ValueError(f"unknown shape field {unknown[0]!r}; known: "
                         f"{', '.join(ModelShape.__dataclass_fields__)}")
    if "n_embd" in overrides and "head_dim" not in overrides:
        n_head = overrides.get("n_head", TINY[arch].n_head)
        overrides["head_dim"] = overrides["n_embd"] // n_head
    if arch == "opt" and "n_head" in overrides:
        overrides.setdefault("n_head_kv", overrides["n_head"])
    return replace(TINY[arch], **overrides).check()
