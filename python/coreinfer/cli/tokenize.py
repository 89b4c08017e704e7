"""`coreinfer tokenize MODEL TEXT`: the ids of a text, with the bytes of each."""

from __future__ import annotations

import argparse
import json
import os

from .options import read_stdin
from .pull import resolve


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tokenize",
        allow_abbrev=False,
        help="show the token ids of a text",
        description="Print one line a token: its id, and its text as a JSON string.",
    )
    parser.add_argument("model", metavar="MODEL", help="a GGUF file or a known model's name")
    parser.add_argument("text", metavar="TEXT", help="the text; - reads it from stdin")
    parser.add_argument("--no-bos", action="store_true", help="do not put the model's BOS first")
    parser.add_argument(
        "--special", action="store_true", help="read the names of control tokens as those tokens"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(call=call, parser=parser)


def call(args: argparse.Namespace) -> int:
    from .._core import GgufFile
    from ..tokenizer import Tokenizer

    text = read_stdin() if args.text == "-" else os.fsencode(args.text)
    file = GgufFile(os.fsencode(resolve(args.model)))
    tokenizer = Tokenizer.from_metadata(file.metadata, file.path)
    ids = tokenizer.tokenize(text, add_bos=not args.no_bos, special=args.special)
    texts = [tokenizer.token_bytes(i, special=True).decode("utf-8", "replace") for i in ids]
    if args.json:
        print(json.dumps({"ids": ids, "tokens": texts}, ensure_ascii=False))
    else:
        for i, token in zip(ids, texts, strict=True):
            print(f"{i}\t{json.dumps(token, ensure_ascii=False)}")
    return 0
