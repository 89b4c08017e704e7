"""The command `coreinfer`: run, tune, cluster, info, tokenize, pull.

Results go to stdout, everything else to stderr. Exit status: 0 fine, 1 runtime error, 2 usage,
130 after Ctrl-C, 141 when the reader of stdout is gone.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from . import cluster, info, options, pull, run, tokenize, tune


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: TextIO | None = None) -> None:
        """As any result: argparse itself would not say that it could not be written."""
        (file or sys.stdout).write(self.format_help())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="coreinfer",
        allow_abbrev=False,
        description="Run GGUF models, dense or with the neurons a prompt activates most.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for module in (run, tune, cluster, info, tokenize, pull):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    if sys.stdout is None:
        _complain("stdout is closed; there is nowhere to write the answer to")
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character gets its escape instead of losing the answer.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                return _run(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError, ImportError) as error:
        _complain(str(error) or type(error).__name__)
        _drop_stdout()
        return 1


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        getattr(args, "parser", parser).error(_unrecognized(args, unknown))
    if args.version:
        from coreinfer import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.error("a command is needed: run, tune, cluster, info, tokenize or pull")
    return args.call(args)


def _drop_stdout() -> None:
    """Where what is left cannot be written, Python would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unrecognized(args: argparse.Namespace, unknown: list[str]) -> str:
    """What nobody asked for, and what may have been meant: a flag, also by its Python name."""
    message = f"unrecognized arguments: {' '.join(unknown)}"
    meant: dict[str, str] = {}
    for action in args.parser._actions if "parser" in args else ():
        for spelled in (*action.option_strings, "--" + action.dest.replace("_", "-")):
            if action.option_strings:
                meant.setdefault(spelled.lstrip("-"), max(action.option_strings, key=len))
    for given in unknown:
        near = difflib.get_close_matches(given.split("=")[0].lstrip("-"), meant, n=1)
        if given.startswith("--") and near:
            message += f"; instead of {given} did you mean {meant[near[0]]}?"
    return message


def _warn(message: Warning | str, *_: object) -> None:
    """Without the line of code, which is none of the user's."""
    options.say(f"coreinfer: warning: {message}")


def _complain(message: str) -> None:
    options.say(f"coreinfer: error: {message}")
