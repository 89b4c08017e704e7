"""Makes tests/golden/transformers_logits.npz: what `transformers` computes on the tiny models.

For developers; needs torch and transformers. Each case is a tiny F32 model of
make_synthetic_model.py, given by architecture, seed and overrides; its weights are put into the
transformers model of that architecture and a few token sequences are run in float64. The file
holds the cases as JSON and, for each, tokens, logits and FFN activations at some positions, so
that the tests need neither package. `--books DIRECTORY` adds the same for the OPT model there.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGUFReader

from hf_architectures import LAYERS_27B, from_gguf_values, hf_name
from make_synthetic_model import make_tiny_model
from model_shape import MLP_BIAS, ModelShape

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
POSITIONS = (0, 10, 23)  # 10 and 23 lie beyond the sliding window of the gemma3 cases
LONG_POSITIONS = (0, 50, 99)  # of the cases that are called long; the last one ends the text
SMALL = {
    "n_layer": 2,
    "n_embd": 64,
    "n_ff": 96,
    "n_head": 4,
    "n_head_kv": 2,
    "head_dim": 16,
    "n_vocab": 272,
    "n_ctx": 64,
}
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context_length": 32,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama", "seed": 1, **SMALL},
    "llama_linear": {
        "arch": "llama",
        "seed": 2,
        **SMALL,
        "n_head_kv": 4,
        "tied": True,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "llama3_scaling": {
        "arch": "llama",
        "seed": 3,
        **SMALL,
        "n_embd": 96,
        "n_head": 3,
        "n_head_kv": 1,
        "head_dim": 32,
        "rope_scaling": LLAMA3,
    },
    "llama_yarn": {
        "arch": "llama",
        "seed": 11,
        **SMALL,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_context_length": 32},
    },
    "llama_relu": {"arch": "llama", "seed": 11, **SMALL, "activation": "relu"},
    "llama_fatrelu": {"arch": "llama", "seed": 12, **SMALL, "activation": "fatrelu:0.25"},
    "llama_drelu": {"arch": "llama", "seed": 13, **SMALL, "activation": "drelu"},
    "qwen2": {"arch": "qwen2", "seed": 4, **SMALL},
    "qwen3": {"arch": "qwen3", "seed": 5, **SMALL, "head_dim": 24},
    "gemma": {"arch": "gemma", "seed": 14, **SMALL, "head_dim": 24},
    "gemma2": {
        "arch": "gemma2",
        "seed": 15,
        **SMALL,
        "n_layer": 4,
        "head_dim": 24,
        "sliding_window": 5,
        "attn_softcap": 3.0,
        "final_softcap": 5.0,
    },
    "gemma2_27b": {
        "arch": "gemma2",
        "seed": 16,
        **SMALL,
        "n_layer": 46,
        "n_embd": 32,
        "n_ff": 32,
        "head_dim": 10,
        "sliding_window": 5,
        "attn_softcap": 50.0,
        "final_softcap": 30.0,
    },
    "gemma3": {
        "arch": "gemma3",
        "seed": 6,
        **SMALL,
        "n_layer": 7,
        "head_dim": 24,
        "sliding_window": 5,
    },
    "gemma3_linear": {
        "arch": "gemma3",
        "seed": 7,
        **SMALL,
        "n_layer": 6,
        "sliding_window": 8,
        "rope_scaling": {"type": "linear", "factor": 8.0},
    },
    "granite": {
        "arch": "granite",
        "seed": 17,
        **SMALL,
        "n_layer": 3,
        "embedding_scale": 12.0,
        "residual_scale": 0.22,
        "attention_scale": 0.08,
        "logit_scale": 0.7,
    },
    "minicpm": {
        "arch": "minicpm",
        "seed": 20,
        **SMALL,
        "n_layer": 3,
        "norm_eps": 0.01,
        "activation": "fatrelu:0.25",
        "embedding_scale": 12.0,
        "residual_scale": 0.4,
        "logit_scale": 3.0,
    },
    "smollm3": {"arch": "smollm3", "seed": 18, **SMALL, "n_layer": 5},
    "olmo2": {"arch": "olmo2", "seed": 19, **SMALL, "n_layer": 3},
    "opt": {"arch": "opt", "seed": 8, **SMALL, "n_head_kv": 4},
    "qwen3_long": {"arch": "qwen3", "seed": 9, **SMALL, "n_ctx": 128, "head_dim": 40, "tied": True},
    "llama_biases": {
        "arch": "llama",
        "seed": 14,
        **SMALL,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen3_biases": {"arch": "qwen3", "seed": 15, **SMALL, "attention_bias": True},
    "granite_biases": {
        "arch": "granite",
        "seed": 22,
        **SMALL,
        "embedding_scale": 12.0,
        "residual_scale": 0.22,
        "attention_scale": 0.08,
        "logit_scale": 0.7,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm3_biases": {
        "arch": "smollm3",
        "seed": 23,
        **SMALL,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gemma3_biases": {
        "arch": "gemma3",
        "seed": 16,
        **SMALL,
        "sliding_window": 8,
        "attention_bias": True,
    },
    "qwen2_yarn_long": {
        "arch": "qwen2",
        "seed": 12,
        **SMALL,
        "n_ctx": 128,
        "rope_freq_base": 500.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.5,
            "original_context_length": 48,
            "yarn_beta_fast": 3.0,
            "yarn_beta_slow": 0.25,
            "attn_factor": 1.3,
        },
    },
    "qwen3_yarn": {
        "arch": "qwen3",
        "seed": 13,
        **SMALL,
        "head_dim": 40,
        "rope_freq_base": 1e6,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16.0,
            "original_context_length": 1000,
            "yarn_log_multiplier": 0.5,
        },
    },
    "phi3_long": {
        "arch": "phi3",
        "seed": 17,
        **SMALL,
        "n_ctx": 128,
        "sliding_window": 40,
        "rope_dim": 12,
        "rope_scaling": {
            "type": "longrope",
            "original_context_length": 32,
            "attn_factor": 1.18,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
        },
    },
    "phi3_short": {  # a context that is not above the original one
        "arch": "phi3",
        "seed": 18,
        **SMALL,
        "n_embd": 192,
        "n_head": 2,
        "head_dim": 96,
        "tied": True,
        "sliding_window": None,
        "rope_dim": None,
        "rope_scaling": {
            "type": "longrope",
            "original_context_length": 64,
            "attn_factor": 1.18,
            "short_factor": [1.0 + 0.1 * i for i in range(48)],
            "long_factor": [2.0 + 0.4 * i for i in range(48)],
        },
    },
    "phi3_plain": {
        "arch": "phi3",
        "seed": 19,
        **SMALL,
        "sliding_window": 8,
        "rope_dim": None,
        "rope_scaling": None,
    },
    "gemma3_long": {
        "arch": "gemma3",
        "seed": 10,
        **SMALL,
        "n_layer": 4,
        "n_ctx": 128,
        "head_dim": 24,
        "sliding_window": 40,
        "rope_scaling": {"type": "linear", "factor": 8.0},
        "extra_metadata": {
            "gemma3.attention.sliding_window_pattern": [1, 0, 0, 1],
            "gemma3.rope.freq_base_swa": 20000.0,
            "gemma3.final_logit_softcapping": 5.0,
        },
    },
}


def build(
    shape: ModelShape, path: Path, extra_metadata: dict[str, Any] | None = None
) -> torch.nn.Module:
    """The transformers model with the weights of the F32 file at `path`, in float64."""
    model = transformers.AutoModelForCausalLM.from_config(config_of(shape, extra_metadata or {}))
    state = {}
    for tensor in GGUFReader(str(path)).tensors:
        if not tensor.name.startswith("rope_"):
            values = np.array(tensor.data, np.float32).reshape(tensor.shape[::-1])
            state[hf_name(shape.arch, tensor.name)] = torch.tensor(
                from_gguf_values(shape, tensor.name, values)
            )
    if shape.tied:
        state["lm_head.weight"] = state[hf_name(shape.arch, "token_embd.weight")]
    model.load_state_dict(state, strict=True)
    if shape.activation:
        activate(model, shape.activation)
    return model.double().eval()


def activate(model: torch.nn.Module, activation: str) -> None:
    """Change a model with ReLU to what only some models' own code has."""
    name, _, threshold = activation.partition(":")
    for module in [m for m in model.modules() if hasattr(m, "up_proj")]:
        if name == "fatrelu":
            module.act_fn = torch.nn.Threshold(float(threshold), 0.0)
        if name == "drelu":
            module.up_proj = torch.nn.Sequential(module.up_proj, torch.nn.ReLU())


def config_of(shape: ModelShape, extra_metadata: dict[str, Any]) -> transformers.PretrainedConfig:
    """The transformers config of a shape, and of gemma3's keys that a shape does not have."""
    common = {
        "vocab_size": shape.n_vocab,
        "hidden_size": shape.n_embd,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "max_position_embeddings": shape.n_ctx,
        "tie_word_embeddings": shape.tied,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if shape.arch == "opt":
        return transformers.OPTConfig(
            **common, ffn_dim=shape.n_ff, word_embed_proj_dim=shape.n_embd
        )
    common |= {
        "intermediate_size": shape.n_ff,
        "num_key_value_heads": shape.n_head_kv,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope_of(shape),
        "attention_bias": shape.attention_bias,
    }
    if shape.arch == "phi3":
        del common["head_dim"], common["attention_bias"]
        original = (shape.rope_scaling or {}).get("original_context_length", shape.n_ctx)
        return transformers.Phi3Config(
            **common, original_max_position_embeddings=original, sliding_window=shape.sliding_window
        )
    if shape.arch == "gemma":
        return transformers.GemmaConfig(**common)
    if shape.arch == "gemma2":
        narrow = shape.n_embd // shape.n_head if shape.n_layer == LAYERS_27B["gemma2"] else None
        return transformers.Gemma2Config(
            **common,
            query_pre_attn_scalar=narrow or shape.head_dim,
            sliding_window=shape.sliding_window,
            attn_logit_softcapping=shape.attn_softcap,
            final_logit_softcapping=shape.final_softcap,
            attn_implementation="eager",  # the others leave the cap out
        )
    if shape.arch == "gemma3":
        local_base = extra_metadata.get("gemma3.rope.freq_base_swa", 10000.0)
        local = {"rope_type": "default", "rope_theta": local_base}
        common["rope_parameters"] = {"full_attention": rope_of(shape), "sliding_attention": local}
        pattern = extra_metadata.get("gemma3.attention.sliding_window_pattern")
        return transformers.Gemma3TextConfig(
            **common,
            query_pre_attn_scalar=shape.head_dim,
            sliding_window=shape.sliding_window,
            layer_types=pattern and [("full", "sliding")[s] + "_attention" for s in pattern],
            final_logit_softcapping=extra_metadata.get("gemma3.final_logit_softcapping"),
        )
    if shape.arch in ("granite", "minicpm"):  # transformers has no MiniCPM
        common |= {
            "embedding_multiplier": shape.embedding_scale,
            "residual_multiplier": shape.residual_scale,
            "attention_multiplier": shape.attention_scale or shape.head_dim**-0.5,
            "logits_scaling": shape.logit_scale,
        }
    kinds = {
        "granite": transformers.GraniteConfig,
        "minicpm": transformers.GraniteConfig,
        "smollm3": transformers.SmolLM3Config,
        "olmo2": transformers.Olmo2Config,
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    if shape.arch in MLP_BIAS:
        common["mlp_bias"] = shape.mlp_bias
    return kinds[shape.arch](**common, hidden_act="relu" if shape.activation else "silu")


def rope_of(shape: ModelShape) -> dict[str, Any]:
    """transformers' rope_parameters of a shape."""
    scaling = dict(shape.rope_scaling or {"type": "default"})
    out = {"rope_type": scaling.pop("type"), "rope_theta": shape.rope_freq_base}
    if "original_context_length" in scaling:
        scaling["original_max_position_embeddings"] = scaling.pop("original_context_length")
    for theirs, ours in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if ours in scaling:
            scaling[theirs] = scaling.pop(ours)
    if "yarn_log_multiplier" in scaling:
        scaling |= {"mscale": 1.0, "mscale_all_dim": scaling.pop("yarn_log_multiplier")}
    if shape.arch == "phi3":
        out["partial_rotary_factor"] = shape.n_rotated / shape.head_dim
    if "attn_factor" in scaling:  # theirs takes the place of the factor computed for YaRN
        yarn = out["rope_type"] == "yarn"
        computed = 0.1 * math.log(scaling["factor"]) + 1.0 if yarn else 1.0
        scaling["attention_factor"] = scaling.pop("attn_factor") * computed
    return out | scaling


def run(model: torch.nn.Module, arch: str, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n_tokens, n_vocab) and FFN activations (n_layer, n_tokens, n_ff)."""
    h: list[np.ndarray] = []
    suffix = ".fc2" if arch == "opt" else ".mlp.down_proj"
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args: h.append(args[0].reshape(len(tokens), -1).numpy().copy())
        )
        for name, module in model.named_modules()
        if name.endswith(suffix)
    ]
    with torch.no_grad():
        logits = model(torch.tensor(tokens.astype(np.int64))[None]).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    return logits, np.stack(h)


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz and say how large it is."""
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def tiny_goldens() -> dict[str, np.ndarray]:
    """Arrays of all CASES."""
    arrays: dict[str, np.ndarray] = {"cases": np.array(json.dumps(CASES))}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.gguf"
            shape = make_tiny_model(path, **case)
            model = build(shape, path, case.get("extra_metadata"))
        positions = list(LONG_POSITIONS if name.endswith("_long") else POSITIONS)
        n_tokens = positions[-1] + 1
        tokens = np.random.default_rng(case["seed"]).integers(0, shape.n_vocab, n_tokens)
        logits, h = run(model, shape.arch, tokens)
        arrays[f"{name}.tokens"] = tokens.astype(np.int32)
        arrays[f"{name}.positions"] = np.array(positions)
        arrays[f"{name}.logits"] = logits[positions].astype(np.float32)
        arrays[f"{name}.h"] = h[:, positions].astype(np.float32)
    return arrays


def book_goldens(directory: Path) -> dict[str, np.ndarray]:
    """Tokens of one sentence, and the 20 largest logits at three positions."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "Once upon a time there was a little girl who lived in a house by the river,"
    tokens = np.array(tokenizer(text)["input_ids"], np.int32)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    logits, _ = run(model.eval(), "opt", tokens)
    positions = np.array([0, len(tokens) // 2, len(tokens) - 1], np.int32)
    top = np.argsort(-logits[positions], axis=-1, kind="stable")[:, :20]
    return {
        "text": np.array(text),
        "tokens": tokens,
        "positions": positions,
        "top_ids": top.astype(np.int32),
        "top_logits": np.take_along_axis(logits[positions], top, axis=-1).astype(np.float32),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", type=Path, help="directory of the opt-books-17m model")
    args = parser.parse_args()
    save(GOLDEN / "transformers_logits.npz", tiny_goldens())
    if args.books:
        save(GOLDEN / "opt_books_logits.npz", book_goldens(args.books))


if __name__ == "__main__":
    main()
