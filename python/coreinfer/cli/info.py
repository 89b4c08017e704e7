"""`coreinfer info MODEL`: what a GGUF file holds, and whether it can run here."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from typing import Any

import numpy as np

from .pull import resolve

_LONGEST = 8  # elements of an array, and characters × 10 of a text, that are shown


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "info",
        allow_abbrev=False,
        help="show what a model file holds",
        description="Print metadata, tensor types and whether this model can run here.",
    )
    parser.add_argument("model", metavar="MODEL", help="a GGUF file or a known model's name")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(call=call, parser=parser)


def call(args: argparse.Namespace) -> int:
    facts = collect(resolve(args.model))
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print(_text(facts))
    return 0


def collect(path: str) -> dict[str, Any]:
    """Facts of a file as plain data; what cannot run here is listed under `unsupported`."""
    from .. import _core
    from ..tokenizer import Tokenizer

    system_path = os.fsencode(path)  # a file name need not be UTF-8
    file = _core.GgufFile(system_path)
    unsupported: list[str] = []
    config: dict[str, Any] | None = None
    backend: dict[str, Any] | None = None
    weight_bytes: int | None = None
    try:
        engine = _core.Engine(system_path)
        config, backend = engine.config, engine.backend
        weight_bytes = engine.weight_bytes
    except ValueError as error:
        unsupported.append(str(error))
    try:
        made = Tokenizer.from_metadata(file.metadata, file.path)
        tokenizer: dict[str, Any] | None = _tokenizer(made)
    except ValueError as error:
        tokenizer = None
        unsupported.append(str(error))
    types: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    for tensor in file.tensors:
        types[tensor.type] += 1
        n_bytes[tensor.type] += tensor.nbytes
    return {
        "path": path,
        "files": [os.fsdecode(part) for part in file.files],
        "version": file.version,
        "fingerprint": f"{file.fingerprint:016x}",
        "config": config,
        "backend": backend,
        "dense_bytes_per_token": weight_bytes,
        "tokenizer": tokenizer,
        "chat_template": "tokenizer.chat_template" in file.metadata,
        "tensors": {t: {"count": types[t], "bytes": n_bytes[t]} for t in sorted(types)},
        "metadata": {key: _plain(value) for key, value in file.metadata.items()},
        "unsupported": unsupported,
    }


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    return {
        "n_vocab": tokenizer.n_vocab,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "end": sorted(tokenizer.end_ids),
    }


def _plain(value: Any) -> Any:
    """A metadata value for JSON: long arrays as their length and first elements."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        first = [_plain(v) for v in value[:_LONGEST]]
        return first if len(value) <= _LONGEST else {"length": len(value), "first": first}
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def _text(facts: dict[str, Any]) -> str:
    lines = [f"file          {facts['path']} (GGUF {facts['version']})"]
    if facts["config"] is not None:
        c = facts["config"]
        lines += [
            f"architecture  {c['architecture']}, {c['n_layer']} layers, n_embd {c['n_embd']}, "
            f"n_ff {c['n_ff']}, {c['n_head']} heads ({c['n_head_kv']} for keys and values), "
            f"{c['activation']}{', gated' if c['gated'] else ''}",
            f"context       {c['n_ctx_train']} tokens, vocabulary {c['n_vocab']}",
            f"dense decode  {facts['dense_bytes_per_token'] / 1e6:,.1f} MB of weights a token",
            f"backend       {facts['backend']['name']} {facts['backend']['isa']}, "
            f"{facts['backend']['n_threads']} threads",
        ]
    for name, tensors in facts["tensors"].items():
        lines.append(
            f"tensors       {name:<8}{tensors['count']:>5}{tensors['bytes'] / 1e6:>12,.1f} MB"
        )
    lines.append(f"chat template {'yes' if facts['chat_template'] else 'no'}")
    lines += [f"unsupported   {reason}" for reason in facts["unsupported"]]
    lines.append("metadata")
    for key, value in facts["metadata"].items():
        lines.append(f"  {key} = {_short(value)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 10 * _LONGEST else text[: 10 * _LONGEST] + " …"
