"""`coreinfer pull NAME`: fetch a known model into the cache and print its path."""

from __future__ import annotations

import argparse

from .. import models
from .options import say
from .progress import fetch_line


def add_parser(commands: argparse._SubParsersAction) -> None:
    known = "\n".join(f"  {name:<20} {m.note}" for name, m in models.KNOWN_MODELS.items())
    parser = commands.add_parser(
        "pull",
        allow_abbrev=False,
        help="fetch a known model once, and print where it is",
        description="Fetch a known model into the cache, and print its path.",
        epilog=f"known models:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="NAME", help="a known model")
    parser.set_defaults(call=call, parser=parser)


def resolve(name_or_path: str) -> str:
    """`resolve_model`, saying on stderr what is fetched."""
    if not models.is_present(name_or_path):
        say(f"fetching {name_or_path} (once) into {models.cache_dir()}")
    line = fetch_line()
    try:
        return models.resolve_model(name_or_path, progress=line)
    finally:
        line.clear()


def call(args: argparse.Namespace) -> int:
    print(resolve(args.model))
    return 0
