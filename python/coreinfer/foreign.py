"""llama-cpp-python's argument names that have no effect here, and what happens to them.

A value that only steers that library's inner workings is accepted with one warning; one that asks
for another result (a LoRA, a grammar) is refused, because leaving it out silently would answer a
different question. Names that neither library knows are a TypeError that suggests the nearest.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .warning import warn


@dataclass(frozen=True)
class Foreign:
    """One argument of llama-cpp-python: its neutral values, and whether others may be ignored."""

    neutral: tuple[Any, ...]
    ignorable: bool


def _ignored(*neutral: Any) -> Foreign:
    return Foreign(neutral, True)


def _refused(*neutral: Any) -> Foreign:
    return Foreign(neutral, False)


CONSTRUCTOR: Mapping[str, Foreign] = {
    "split_mode": _ignored(1),
    "tensor_split": _ignored(None),
    "use_mmap": _ignored(True),
    "use_mlock": _ignored(False),
    "n_ubatch": _ignored(512),
    "n_threads_batch": _ignored(None),
    "logits_all": _ignored(False),
    "offload_kqv": _ignored(True),
    "flash_attn": _ignored(False),
    "op_offload": _ignored(None),
    "swa_full": _ignored(None),
    "no_perf": _ignored(False),
    "numa": _ignored(False, 0),
    "chat_format": _ignored(None),
    "spm_infill": _ignored(False),
    "vocab_only": _refused(False),
    "kv_overrides": _refused(None),
    "rope_scaling_type": _refused(None, -1),
    "pooling_type": _refused(None, -1),
    "attention_type": _refused(None, -1),
    "rope_freq_base": _refused(0.0),
    "rope_freq_scale": _refused(0.0),
    "yarn_ext_factor": _refused(-1.0),
    "yarn_attn_factor": _refused(1.0),
    "yarn_beta_fast": _refused(32.0),
    "yarn_beta_slow": _refused(1.0),
    "yarn_orig_ctx": _refused(0),
    "embedding": _refused(False),
    "lora_base": _refused(None),
    "lora_scale": _refused(1.0),
    "lora_path": _refused(None),
    "chat_handler": _refused(None),
    "draft_model": _refused(None),
    "tokenizer": _refused(None),
}

SAMPLING: Mapping[str, Foreign] = {
    "tfs_z": _ignored(1.0),
    "penalize_nl": _ignored(True),
    "mirostat_mode": _refused(0),
    "mirostat_tau": _ignored(5.0),
    "mirostat_eta": _ignored(0.1),
    "grammar": _refused(None),
    "xtc_probability": _refused(0.0),
    "xtc_threshold": _ignored(0.1),
    "dry_multiplier": _refused(0.0),
    "idx": _refused(None),
}

COMPLETION: Mapping[str, Foreign] = {
    **SAMPLING,
    "suffix": _refused(None),
    "model": _ignored(None),
}

CHAT: Mapping[str, Foreign] = {
    **SAMPLING,
    "model": _ignored(None),
    "functions": _refused(None, []),
    "function_call": _refused(None),
    "tools": _refused(None, []),
    "tool_choice": _refused(None, "none"),
    "response_format": _refused(None, {"type": "text"}),
}


_NO_EMBEDDINGS = "coreinfer makes no embeddings of texts"

# Methods and attributes that are not here, and what to do without them.
ATTRIBUTES: Mapping[str, str] = {
    "embed": _NO_EMBEDDINGS,
    "create_embedding": _NO_EMBEDDINGS,
    "pooling_type": _NO_EMBEDDINGS,
    "create_chat_completion_openai_v1": "create_chat_completion gives the same as a dictionary",
    "logits_to_logprobs": "logprobs=N of a completion and score(...) give ln p",
    "set_cache": "the last text is kept by itself; save_state and load_state keep others",
    "scores": "eval_logits is the last position's, score(prompt, continuation) gives ln p of all",
    "ctx": "there is no llama.cpp behind it",
    "model": "there is no llama.cpp behind it",
}


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and a == b) or (a == b and isinstance(a, (int, float)))


def check_foreign(
    where: str,
    arguments: Mapping[str, Any],
    table: Mapping[str, Foreign],
    own_names: Iterable[str],
) -> None:
    """Judge keyword arguments that `where` does not have itself.

    Raises
    ------
    TypeError
        A name that neither we nor llama-cpp-python know; the message suggests the nearest.
    ValueError
        A known name whose value asks for something that does not exist here.

    Warns
    -----
    UserWarning
        Once, naming every argument that was accepted without effect.
    """
    without_effect = []
    for name, value in arguments.items():
        if name not in table:
            near = difflib.get_close_matches(name, [*own_names, *table], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{where}() got an unexpected keyword argument {name!r}{hint}")
        if any(_same(value, neutral) for neutral in table[name].neutral):
            continue
        if not table[name].ignorable:
            raise ValueError(f"{where}() does not support {name}={value!r}; leave {name} out")
        without_effect.append(name)
    if without_effect:
        names = ", ".join(without_effect)
        warn(f"{where}(): no effect in coreinfer: {names}")
