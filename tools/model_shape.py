"""What a model's hyperparameters decide: which tensors a GGUF file has, and which metadata.

`ModelShape` is plain data; `tensor_specs` and `architecture_fields` derive from it what
llama.cpp's own converter would write for that architecture (`opt`, which llama.cpp lacks, follows
its habits), and the activation, which it leaves out. The maker of synthetic models and the
converter share them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "granite",
    "minicpm",
    "smollm3",
    "olmo2",
    "opt",
)
GEMMA = ("gemma", "gemma2", "gemma3")
INTERLEAVED = (
    "llama",
    "granite",
    "minicpm",
    "smollm3",
)  # rotate neighbouring rows, the others halves
MLP_BIAS = ("llama", "granite", "smollm3")  # where gate, up and down may have biases
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
}  # general.file_type
QUANTIZATION_VERSION = 2
ROPE_TENSORS = {
    "llama3": ("rope_freqs.weight",),
    "longrope": ("rope_factors_long.weight", "rope_factors_short.weight"),
}
YARN_FIELDS = ("yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier")


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
    # {"type": "linear", "factor": f}, or {"type": "yarn", "factor", "original_context_length",
    # perhaps "attn_factor" and YARN_FIELDS}, or {"type": "llama3", "factor", "low_freq_factor",
    # "high_freq_factor", "original_context_length"} (stored as rope_freqs.weight), or
    # {"type": "longrope", "short_factor", "long_factor" (lists), "original_context_length",
    # "attn_factor"} (phi3 only: stored as rope_factors_short.weight and rope_factors_long.weight)
    rope_scaling: dict[str, Any] | None = None
    # of the local layers of gemma2 and gemma3, of all of phi3's
    sliding_window: int | None = None
    rope_dim: int | None = None  # rotated part of a head (phi3); None: all of it
    attention_bias: bool = False  # of q, k, v and output (opt has them, qwen2 but the last)
    mlp_bias: bool = False  # of gate, up and down (MLP_BIAS; opt has them)
    attn_softcap: float | None = None  # of gemma2 and gemma3, like the next
    final_softcap: float | None = None
    # None: the architecture's own; else "relu", "drelu" (on gate and up) or "fatrelu:T" (0 up to T)
    activation: str | None = None
    # factors of granite and minicpm: of embeddings, of what layers add, of scores; the last divides
    # logits
    embedding_scale: float | None = None
    residual_scale: float | None = None
    attention_scale: float | None = None
    logit_scale: float | None = None

    @property
    def n_q(self) -> int:
        """Rows of the query projection."""
        return self.n_head * self.head_dim

    @property
    def n_kv(self) -> int:
        """Rows of the key and of the value projection."""
        return self.n_head_kv * self.head_dim

    @property
    def n_rotated(self) -> int:
        """Elements of a head that are rotated."""
        return self.rope_dim or self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the FFN is act(gate) * up rather than act(fc1)."""
        return self.arch != "opt"

    def check(self) -> ModelShape:
        """This shape, or ValueError that names the field at fault."""
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {self.arch!r}")
        if self.n_head % self.n_head_kv:
            raise ValueError(
                f"n_head ({self.n_head}) must be a multiple of n_head_kv ({self.n_head_kv})"
            )
        if self.head_dim % 2 and self.arch != "opt":
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.arch == "opt" and not self.tied:
            raise ValueError("opt has a tied head: tied must be True")
        if self.attention_bias and self.arch in ("qwen2", "gemma", "gemma2", "olmo2", "opt"):
            raise ValueError(f"attention_bias is not a choice for {self.arch}")
        if self.mlp_bias and self.arch not in MLP_BIAS:
            raise ValueError(f"mlp_bias is for {', '.join(MLP_BIAS)}, not {self.arch}")
        kind = self.rope_scaling and self.rope_scaling["type"]
        allowed = {
            **dict.fromkeys(("llama", "granite", "minicpm"), (None, "linear", "yarn", "llama3")),
            **dict.fromkeys(("gemma2", "gemma3"), (None, "linear")),
            "phi3": (None, "linear", "longrope"),
            "opt": (None,),
        }
        if kind not in allowed.get(self.arch, (None, "linear", "yarn")):
            raise ValueError(f"rope_scaling type {kind!r} does not exist for {self.arch}")
        if kind == "longrope":
            for key in ("short_factor", "long_factor"):
                if len(self.rope_scaling[key]) != self.n_rotated // 2:
                    raise ValueError(
                        f"{key} has {len(self.rope_scaling[key])} values, expected "
                        f"{self.n_rotated // 2}"
                    )
        return self


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
    n_q, n_kv = shape.n_q, shape.n_kv
    opt, olmo2, phi3 = (shape.arch == arch for arch in ("opt", "olmo2", "phi3"))
    post_norms = shape.arch in ("gemma2", "gemma3", "olmo2")
    qkv_bias = opt or shape.attention_bias or shape.arch == "qwen2"
    output_bias = opt or shape.attention_bias
    mlp_bias = opt or shape.mlp_bias
    specs: list[TensorSpec] = []

    def matrix(name: str, rows: int, columns: int, gain: float) -> None:
        specs.append(
            TensorSpec(f"{name}.weight", (rows, columns), "matrix", gain / math.sqrt(columns))
        )

    def bias(name: str, n: int, scale: float) -> None:
        specs.append(TensorSpec(f"{name}.bias", (n,), "bias", scale))

    def norm(name: str, n: int, center: float = 1.0) -> None:
        specs.append(TensorSpec(f"{name}.weight", (n,), "norm", 0.1 * center, center))
        if opt:
            bias(name, n, 0.1)

    # A tied head would repeat the last token for ever if its row were large in the residual
    # stream: there the embedding is small and the last norm makes up for it.
    embd_gain = 3.0 if not shape.tied else 0.4 if shape.arch in GEMMA else 1.0
    matrix("token_embd", n_vocab, n_embd, embd_gain)
    if opt:
        specs.append(TensorSpec("position_embd.weight", (shape.n_ctx + 2, n_embd), "table", 0.05))
    norm("output_norm", n_embd, 3.0 / embd_gain)
    if not shape.tied:
        matrix("output", n_vocab, n_embd, 3.0)
    for name in ROPE_TENSORS.get((shape.rope_scaling or {}).get("type"), ()):
        specs.append(TensorSpec(name, (shape.n_rotated // 2,), "rope_factors", 0.0))
    for i in range(shape.n_layer):
        blk = f"blk.{i}"
        if not olmo2:
            norm(f"{blk}.attn_norm", n_embd)
        apart = (("q", n_q, 1.4), ("k", n_kv, 1.4), ("v", n_kv, 1.0))
        for name, rows, gain in (("qkv", n_q + 2 * n_kv, 1.3),) if phi3 else apart:
            matrix(f"{blk}.attn_{name}", rows, n_embd, gain)
            if qkv_bias:
                bias(f"{blk}.attn_{name}", rows, 0.3)
        if shape.arch in ("qwen3", "gemma3", "olmo2"):
            norm(f"{blk}.attn_q_norm", n_q if olmo2 else shape.head_dim)
            norm(f"{blk}.attn_k_norm", n_kv if olmo2 else shape.head_dim)
        matrix(f"{blk}.attn_output", n_embd, n_q, 1.0)
        if output_bias:
            bias(f"{blk}.attn_output", n_embd, 0.1)
        if post_norms:
            norm(f"{blk}.post_attention_norm", n_embd)
        if not olmo2:
            norm(f"{blk}.ffn_norm", n_embd)
        if shape.gated and not phi3:
            matrix(f"{blk}.ffn_gate", n_ff, n_embd, 1.0)
            if mlp_bias:
                bias(f"{blk}.ffn_gate", n_ff, 0.3)
        matrix(f"{blk}.ffn_up", 2 * n_ff if phi3 else n_ff, n_embd, 1.0)
        if mlp_bias:
            bias(f"{blk}.ffn_up", n_ff, 0.3)
        matrix(f"{blk}.ffn_down", n_embd, n_ff, 2.0)
        if mlp_bias:
            bias(f"{blk}.ffn_down", n_embd, 0.1)
        if post_norms:
            norm(f"{blk}.post_ffw_norm", n_embd)
    return specs


def rope_factors(shape: ModelShape, name: str) -> np.ndarray:
    """Frequency divisors in the tensor `name`, float32 (n_rotated / 2,).

    Those of Llama 3.1 are 1 for short waves, `factor` for waves longer than the original context,
    a blend between.
    """
    scaling = shape.rope_scaling
    if scaling is None:
        raise ValueError(f"{name} needs a shape with rope_scaling")
    if scaling["type"] == "longrope":
        key = "long_factor" if name == "rope_factors_long.weight" else "short_factor"
        return np.array(scaling[key], np.float32)
    pair = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    turns = scaling["original_context_length"] / (2 * math.pi * shape.rope_freq_base**pair)
    low, high, factor = (scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"])
    smooth = (turns - low) / (high - low)  # turns within the original context: 0 slow .. 1 fast
    blend = 1.0 / ((1 - smooth) / factor + smooth)
    return np.where(turns > high, 1.0, np.where(turns < low, factor, blend)).astype(np.float32)


def architecture_fields(shape: ModelShape, file_type: str, name: str) -> dict[str, Any]:
    """All metadata but the tokenizer's, as key -> bool, int, float or str."""
    arch = shape.arch
    rotary = arch != "opt"
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        f"{arch}.block_count": shape.n_layer,
        f"{arch}.context_length": shape.n_ctx,
        f"{arch}.embedding_length": shape.n_embd,
        f"{arch}.feed_forward_length": shape.n_ff,
        f"{arch}.attention.head_count": shape.n_head,
        f"{arch}.attention.head_count_kv": shape.n_head_kv,
    }
    if arch in ("qwen3", *GEMMA) or shape.n_q != shape.n_embd:
        fields[f"{arch}.attention.key_length"] = shape.head_dim
        fields[f"{arch}.attention.value_length"] = shape.head_dim
    norm_kind = "layer_norm_rms_epsilon" if rotary else "layer_norm_epsilon"
    fields[f"{arch}.attention.{norm_kind}"] = float(shape.norm_eps)
    if rotary:
        fields[f"{arch}.rope.freq_base"] = float(shape.rope_freq_base)
    if arch in INTERLEAVED:
        fields[f"{arch}.rope.dimension_count"] = shape.head_dim
        fields[f"{arch}.vocab_size"] = shape.n_vocab
    scaling = shape.rope_scaling or {}
    if scaling.get("type") in ("linear", "yarn"):
        fields[f"{arch}.rope.scaling.type"] = scaling["type"]
        fields[f"{arch}.rope.scaling.factor"] = float(scaling["factor"])
    if scaling.get("type") == "yarn":
        key = f"{arch}.rope.scaling.original_context_length"
        fields[key] = scaling["original_context_length"]
        for field in ("attn_factor", *YARN_FIELDS):
            if field in scaling:
                fields[f"{arch}.rope.scaling.{field}"] = float(scaling[field])
    if arch == "phi3":
        fields["phi3.rope.dimension_count"] = shape.n_rotated
        original = scaling.get("original_context_length", shape.n_ctx)
        fields["phi3.rope.scaling.original_context_length"] = original
    if scaling.get("type") == "longrope":
        fields["phi3.rope.scaling.type"] = "longrope"
        fields["phi3.rope.scaling.attn_factor"] = float(scaling["attn_factor"])
    if shape.sliding_window:
        fields[f"{arch}.attention.sliding_window"] = shape.sliding_window
    if shape.attn_softcap:
        fields[f"{arch}.attn_logit_softcapping"] = float(shape.attn_softcap)
    if shape.final_softcap:
        fields[f"{arch}.final_logit_softcapping"] = float(shape.final_softcap)
    for key, scale in (
        ("embedding_scale", shape.embedding_scale),
        ("residual_scale", shape.residual_scale),
        ("attention.scale", shape.attention_scale),
        ("logit_scale", shape.logit_scale),
    ):
        if scale:
            fields[f"{arch}.{key}"] = float(scale)
    if shape.activation:
        name, _, threshold = shape.activation.partition(":")
        fields[f"{arch}.hidden_activation"] = name
        if threshold:
            fields[f"{arch}.hidden_activation_threshold"] = float(threshold)
    fields["general.file_type"] = FILE_TYPES[file_type]
    fields["general.quantization_version"] = QUANTIZATION_VERSION
    return fields
