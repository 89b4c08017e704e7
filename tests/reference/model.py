"""A float64 forward pass over a GGUF file, for llama, qwen2, qwen3, gemma 1 to 3, phi3, granite,
minicpm, smollm3, olmo2 and opt.

In: a file and token ids. Out: logits of every token, and the activations of every FFN layer.
Prefill, decode and score are the same function here; decoding with core neurons is the FFN
restricted to given columns. No chunking, no threads, no quantised arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reference.quant import GgufTensors, log_softmax

GEMMA = ("gemma", "gemma2", "gemma3")
INTERLEAVED = ("llama", "granite", "minicpm", "smollm3")
GLOBAL_EVERY = {"gemma2": 2, "gemma3": 6}  # layers of which the last attends to everything
GEMMA3_LOCAL_ROPE_BASE = 10000.0
LAYERS_27B = {"gemma2": 46, "gemma3": 62}  # scale attention by n_embd / n_head, not by head_dim
OWN_ACTIVATION = {"opt": "relu"} | dict.fromkeys(GEMMA, "gelu_tanh")  # the others have silu
CoreLayers = Sequence[np.ndarray | None]


@dataclass(frozen=True)
class Config:
    """Hyperparameters as the file states them, with llama.cpp's defaults for absent ones."""

    arch: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    norm_eps: float
    rope_base: float
    rope_factor: float  # angles are divided by it
    yarn: tuple[float, float, float] | None  # original context, beta_fast, beta_slow
    rope_magnitude: float  # cos and sin are multiplied by it
    attn_scale: float
    rope_dim: int  # rotated elements at the start of a head
    n_ctx: int  # of the session; above the original context phi3's long factors hold
    original_context: int
    window: int | None  # sliding window of local layers
    pattern: int | list[int]  # of local layers: every which one is global, or a flag for each
    local_rope_base: float
    local_rope_factor: float
    attn_softcap: float  # 0: none
    final_softcap: float
    rope: bool  # nowhere where not
    embedding_scale: float
    residual_scale: float
    logit_scale: float  # logits are divided by it
    activation: str
    threshold: float  # of fatrelu

    @classmethod
    def read(cls, file: GgufTensors, n_ctx: int | None = None) -> Config:
        """Config of a file; ValueError for an architecture or rope scaling not covered here.

        n_ctx None: what the model was trained for.
        """
        arch = file.field("general.architecture")
        if arch not in (
            "llama",
            "qwen2",
            "qwen3",
            *GEMMA,
            "phi3",
            "granite",
            "minicpm",
            "smollm3",
            "olmo2",
            "opt",
        ):
            raise ValueError(f"the oracle does not know architecture {arch!r}")

        def get(key: str, default: float | None = None) -> float:
            return file.field(f"{arch}.{key}", default)

        scaling = file.field(f"{arch}.rope.scaling.type", "none")
        own = {"gemma2": None, "gemma3": None, "phi3": "longrope"}
        known = ("none", "linear", own.get(arch, "yarn"))
        if scaling not in known:
            raise ValueError(f"the oracle does not know rope scaling {scaling!r}")
        factor = float(get("rope.scaling.factor", 1.0)) if scaling != "none" else 1.0
        magnitude = float(get("rope.scaling.attn_factor", 1.0))
        yarn = None
        if scaling == "yarn":
            original = float(get("rope.scaling.original_context_length", get("context_length")))
            fast, slow = (
                get(f"rope.scaling.yarn_beta_{k}", d) for k, d in (("fast", 32), ("slow", 1))
            )
            yarn = (original, fast, slow)
            weight = get("rope.scaling.yarn_log_multiplier", 0.0)
            magnitude *= yarn_magnitude(factor, 1.0) / yarn_magnitude(factor, weight)
        n_layer, n_embd, n_head = (
            int(get(key)) for key in ("block_count", "embedding_length", "attention.head_count")
        )
        head_dim = int(get("attention.key_length", n_embd // n_head))
        narrow = n_embd // n_head if n_layer == LAYERS_27B.get(arch) else head_dim
        eps_key = "layer_norm_epsilon" if arch == "opt" else "layer_norm_rms_epsilon"
        windows = {"gemma2": 4096, "gemma3": 0, "phi3": 0}  # where the file does not say
        window = get("attention.sliding_window", windows[arch]) if arch in windows else 0
        caps = (50.0, 30.0) if arch == "gemma2" else (0.0, 0.0)
        rope_base = float(get("rope.freq_base", 10000.0))
        gemma3 = arch == "gemma3"
        local_base = get("rope.freq_base_swa", GEMMA3_LOCAL_ROPE_BASE if gemma3 else rope_base)
        return cls(
            arch=arch,
            n_layer=n_layer,
            n_embd=n_embd,
            n_ff=int(get("feed_forward_length")),
            n_head=n_head,
            n_head_kv=int(get("attention.head_count_kv", n_head)),
            head_dim=head_dim,
            norm_eps=float(get(f"attention.{eps_key}")),
            rope_base=rope_base,
            rope_factor=factor,
            yarn=yarn,
            rope_magnitude=magnitude,
            attn_scale=float(get("attention.scale", 0.0)) or narrow**-0.5,
            rope_dim=int(get("rope.dimension_count", head_dim)),
            n_ctx=n_ctx or int(get("context_length")),
            original_context=int(get("rope.scaling.original_context_length", 0)),
            window=int(window) or None,
            pattern=get("attention.sliding_window_pattern", GLOBAL_EVERY.get(arch, 1)),
            local_rope_base=float(local_base),
            local_rope_factor=1.0 if gemma3 else factor,
            attn_softcap=float(get("attn_logit_softcapping", caps[0])),
            final_softcap=float(get("final_logit_softcapping", caps[1])),
            rope=arch != "opt" and (arch != "granite" or bool(get("rope.scaling.finetuned", True))),
            embedding_scale=n_embd**0.5 if arch in GEMMA else float(get("embedding_scale", 1.0)),
            residual_scale=float(get("residual_scale", 1.0)),
            logit_scale=float(get("logit_scale", 1.0)),
            activation=get("hidden_activation", OWN_ACTIVATION.get(arch, "silu")),
            threshold=float(get("hidden_activation_threshold", 0.0)),
        )

    def has_rope(self, layer: int) -> bool:
        """Whether a layer's queries and keys are rotated."""
        return self.rope and (self.arch != "smollm3" or (layer + 1) % 4 != 0)

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only the last `window` tokens."""
        if self.arch == "phi3":
            slides = True
        elif isinstance(self.pattern, list):
            slides = bool(self.pattern[layer])
        else:
            slides = self.pattern == 0 or (layer + 1) % self.pattern != 0
        return self.window is not None and slides

    def rope_frequencies(self, layer: int) -> np.ndarray:
        """Radians a position, for each pair of rotated dimensions, without what tensors add."""
        half = self.rope_dim // 2
        if self.is_local(layer) and self.arch in GLOBAL_EVERY:
            return frequencies(self.local_rope_base, half) / self.local_rope_factor
        own = frequencies(self.rope_base, half)
        if self.yarn is None:
            return own / self.rope_factor
        original, fast, slow = self.yarn

        def pair_that_turns(times: float) -> float:
            return half * math.log(original / (times * 2 * math.pi)) / math.log(self.rope_base)

        first = max(math.floor(pair_that_turns(fast)), 0)
        last = min(math.ceil(pair_that_turns(slow)), 2 * half - 1)
        interpolated = np.clip((np.arange(half) - first) / max(last - first, 0.001), 0, 1)
        return own * (1 - interpolated) + own / self.rope_factor * interpolated


@dataclass
class KvCache:
    """Keys and values of every layer, (n_past, n_head_kv, head_dim) each, rotated already."""

    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    @property
    def n_past(self) -> int:
        """Number of tokens in the cache."""
        return len(self.keys[0]) if self.keys else 0


@dataclass(frozen=True)
class Forward:
    """What one forward pass gives.

    logits : (n_tokens, n_vocab)
    h : (n_layer, n_tokens, n_ff), what enters the down projection (zero outside a core set)
    act : (n_layer, n_tokens, n_ff), act(gate) alone; the same as h for ungated FFNs
    """

    logits: np.ndarray
    h: np.ndarray
    act: np.ndarray


class ReferenceModel:
    """The model of one GGUF file. Weights are dequantised to float32 once and used in `dtype`."""

    def __init__(
        self, path: str | Path, dtype: type = np.float64, n_ctx: int | None = None
    ) -> None:
        self.file = GgufTensors(path)
        self.config = Config.read(self.file, n_ctx)
        self.dtype = dtype
        self._loaded: dict[str, np.ndarray] = {}

    def weight(self, name: str) -> np.ndarray:
        """A tensor by its full name, as `dtype`."""
        if name not in self._loaded:
            self._loaded[name] = self.file.load(name)
        return self._loaded[name].astype(self.dtype, copy=False)

    def forward(
        self,
        tokens: Sequence[int],
        cache: KvCache | None = None,
        core_layers: CoreLayers | None = None,
    ) -> Forward:
        """Run tokens after those in `cache` (which grows), each seeing all before it.

        `core_layers[i]` holds the neurons of layer i to compute, ascending; None is all of them.
        """
        config = self.config
        cache = KvCache() if cache is None else cache
        positions = cache.n_past + np.arange(len(tokens))
        x = self._embed(tokens, positions)
        all_h, all_act = [], []
        for i in range(config.n_layer):
            blk = f"blk.{i}"
            y = self._attention(i, self._norm(x, f"{blk}.attn_norm"), positions, cache)
            y = self._norm(y, f"{blk}.post_attention_norm")
            x = x + y * config.residual_scale
            core = None if core_layers is None else core_layers[i]
            y, h, act = self._ffn(blk, self._norm(x, f"{blk}.ffn_norm"), core)
            y = self._norm(y, f"{blk}.post_ffw_norm")
            x = x + y * config.residual_scale
            all_h.append(h)
            all_act.append(act)
        head = "output.weight" if "output.weight" in self.file else "token_embd.weight"
        logits = self._norm(x, "output_norm") @ self.weight(head).T
        logits = softcapped(logits / config.logit_scale, config.final_softcap)
        return Forward(logits, np.stack(all_h), np.stack(all_act))

    def score(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        core_layers: CoreLayers | None = None,
    ) -> np.ndarray:
        """ln p(. | prompt, continuation[:k]) in row k, float64 (len(continuation), n_vocab).

        Row 0 comes from the dense prefill; the later rows run through the core sets.
        """
        cache = KvCache()
        logits = [self.forward(prompt, cache).logits[-1:]]
        if len(continuation) > 1:
            logits.append(self.forward(continuation[:-1], cache, core_layers).logits)
        return log_softmax(np.concatenate(logits))

    def generate(
        self, prompt: Sequence[int], n_tokens: int, core_layers: CoreLayers | None = None
    ) -> list[int]:
        """Greedy continuation: dense prefill, then decoding through the core sets."""
        cache = KvCache()
        logits = self.forward(prompt, cache).logits[-1]
        out = [int(logits.argmax())]
        while len(out) < n_tokens:
            logits = self.forward(out[-1:], cache, core_layers).logits[-1]
            out.append(int(logits.argmax()))
        return out

    def _embed(self, tokens: Sequence[int], positions: np.ndarray) -> np.ndarray:
        x = self.weight("token_embd.weight")[np.asarray(tokens, np.int64)]
        x = x * self.dtype(self.config.embedding_scale)
        if self.config.arch == "opt":
            return x + self.weight("position_embd.weight")[positions + 2]
        return x

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """RMSNorm, or LayerNorm for opt, over the last axis; x where the file has no such norm.

        (Gemma's files hold 1 + w.)
        """
        if f"{name}.weight" not in self.file:
            return x
        weight = self.weight(f"{name}.weight")
        if self.config.arch == "opt":
            x = x - x.mean(axis=-1, keepdims=True)
        scaled = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config.norm_eps)
        return scaled * weight + (self.weight(f"{name}.bias") if f"{name}.bias" in self.file else 0)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.weight(f"{name}.weight").T
        return y + self.weight(f"{name}.bias") if f"{name}.bias" in self.file else y

    def _attention(
        self, layer: int, x: np.ndarray, positions: np.ndarray, cache: KvCache
    ) -> np.ndarray:
        config, blk = self.config, f"blk.{layer}"
        n = len(x)
        if f"{blk}.attn_qkv.weight" in self.file:
            ends = (config.n_head + np.array([0, config.n_head_kv])) * config.head_dim
            q, k, v = np.split(self._linear(x, f"{blk}.attn_qkv"), ends, axis=1)
        else:
            q, k, v = (self._linear(x, f"{blk}.attn_{name}") for name in "qkv")
        if config.arch == "olmo2":  # over all heads together
            q, k = self._norm(q, f"{blk}.attn_q_norm"), self._norm(k, f"{blk}.attn_k_norm")
        q, k, v = (rows.reshape(n, -1, config.head_dim) for rows in (q, k, v))
        if config.arch in ("qwen3", "gemma3"):
            q = self._norm(q, f"{blk}.attn_q_norm")
            k = self._norm(k, f"{blk}.attn_k_norm")
        if config.has_rope(layer):
            q = self._rope(q, positions, layer)
            k = self._rope(k, positions, layer)
        if len(cache.keys) == layer:
            cache.keys.append(k)
            cache.values.append(v)
        else:
            cache.keys[layer] = np.concatenate([cache.keys[layer], k])
            cache.values[layer] = np.concatenate([cache.values[layer], v])
        # each key/value head serves n_head / n_head_kv query heads in a row
        group = config.n_head // config.n_head_kv
        keys = np.repeat(cache.keys[layer], group, axis=1)
        values = np.repeat(cache.values[layer], group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, keys) * config.attn_scale
        scores = softcapped(scores, config.attn_softcap)
        distance = positions[:, None] - np.arange(len(keys))[None, :]
        hidden = distance < 0
        if config.is_local(layer):
            hidden |= distance >= config.window
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        y = np.einsum("hqk,khd->qhd", weights, values).reshape(n, -1)
        return self._linear(y, f"{blk}.attn_output")

    def _rope(self, x: np.ndarray, positions: np.ndarray, layer: int) -> np.ndarray:
        """Rotate pairs of dimensions: (2j, 2j+1) for some, (j, j + rope_dim/2) for the others."""
        config = self.config
        half = config.rope_dim // 2
        frequency = config.rope_frequencies(layer)
        long = config.n_ctx > config.original_context
        for name in ("rope_freqs", "rope_factors_long" if long else "rope_factors_short"):
            if f"{name}.weight" in self.file:
                frequency = frequency / self.weight(f"{name}.weight")
        angle = (positions[:, None] * frequency)[:, None, :]  # (n, 1, half)
        cos, sin = np.cos(angle) * config.rope_magnitude, np.sin(angle) * config.rope_magnitude
        if config.arch in INTERLEAVED:
            even, odd = np.s_[..., 0 : 2 * half : 2], np.s_[..., 1 : 2 * half : 2]
        else:
            even, odd = np.s_[..., :half], np.s_[..., half : 2 * half]
        out = x.copy()
        out[even] = x[even] * cos - x[odd] * sin
        out[odd] = x[even] * sin + x[odd] * cos
        return out

    def _ffn(
        self, blk: str, x: np.ndarray, core: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The FFN's output, its activations h and act(gate)."""
        up = self._linear(x, f"{blk}.ffn_up")
        if self.config.arch == "opt":
            act = self._activate(up)
            h = act
        else:
            if self.config.arch == "phi3":
                gate, up = np.split(up, 2, axis=-1)
            else:
                gate = self._linear(x, f"{blk}.ffn_gate")
            act = self._activate(gate)
            h = act * (self._activate(up) if self.config.activation == "drelu" else up)
        if core is not None:
            kept = np.zeros_like(h)
            kept[:, core] = h[:, core]
            h = kept
        return self._linear(h, f"{blk}.ffn_down"), h, act

    def _activate(self, x: np.ndarray) -> np.ndarray:
        name = self.config.activation
        if name in ("relu", "drelu", "fatrelu"):
            return np.where(x > self.config.threshold, x, 0)
        return {"silu": silu, "gelu_tanh": gelu_tanh}[name](x)


def frequencies(base: float, half: int) -> np.ndarray:
    """base ** (-i / half) of `half` pairs."""
    return base ** (-np.arange(half, dtype=np.float64) / half)


def yarn_magnitude(factor: float, weight: float) -> float:
    """What YaRN multiplies cos and sin by, so that attention stays as sharp."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def softcapped(x: np.ndarray, cap: float) -> np.ndarray:
    """cap * tanh(x / cap); x where cap is 0."""
    return cap * np.tanh(x / cap) if cap else x


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), without overflow for very negative x."""
    return x * 0.5 * (1 + np.tanh(0.5 * x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of GELU."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
