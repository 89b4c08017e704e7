"""`coreinfer run MODEL`: answer a prompt, streaming the text; a summary goes to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from ..config import DEFAULT_CORE_MODE, CoreConfig, LoadConfig, SamplingConfig
from . import options
from .progress import ProgressLine
from .pull import resolve

if TYPE_CHECKING:
    from ..llama import Llama
    from ..text_stream import TextStream

DEFAULT_MAX_TOKENS = 512
DEFAULT_TEMPERATURE = 0.0  # a command gives the same answer again, dense and core comparable


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="answer a prompt",
        description="Answer a prompt. The text streams to stdout, a summary goes to stderr.",
    )
    parser.add_argument("model", metavar="MODEL", help="a GGUF file or a known model's name")
    parser.add_argument("stdin", nargs="?", metavar="-", help="read the prompt from stdin")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    parser.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without chat template"
    )
    parser.add_argument(
        "-n",
        dest="max_tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="tokens to generate at most; 0: as many as fit (default: %(default)s)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")

    core = parser.add_argument_group("core neurons")
    options.add_flags(core, CoreConfig, default_notes={"mode": DEFAULT_CORE_MODE})
    core.add_argument("--core-file", metavar="FILE", help="decode with the core set in this file")
    core.add_argument("--save-core", metavar="FILE", help="save the core set that was used (.npz)")

    sampling = parser.add_argument_group("sampling")
    options.add_flags(
        sampling, SamplingConfig, default_notes={"temperature": f"{DEFAULT_TEMPERATURE:g}"}
    )

    loading = parser.add_argument_group("model")
    options.add_flags(loading, LoadConfig)
    parser.set_defaults(call=call, parser=parser)


def call(args: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = args.parser
    core = _core_config(parser, args)
    load = options.make(parser, LoadConfig, options.given(args, LoadConfig))
    values = {"temperature": DEFAULT_TEMPERATURE, **options.given(args, SamplingConfig)}
    sampling = options.make(parser, SamplingConfig, values)
    if any(not stop for stop in args.stop):
        parser.error("--stop is empty; expected some text")
    prompt = _prompt(parser, args)

    from ..core_sets import CoreSet
    from ..llama import Llama

    handed_in = None if args.core_file is None else CoreSet.load(args.core_file)
    line = ProgressLine("reading the prompt", "tokens")
    with Llama(
        resolve(args.model),
        **vars(load),
        core=core if handed_in is None else handed_in,
        verbose=False,
        prefill_progress=line,
    ) as llm:
        result = _answer(llm, args, prompt, sampling, line)
        facts = _facts(llm, result)
        print(json.dumps(facts, ensure_ascii=False) if args.json else "", flush=True)
        options.say(summary(facts))
        if args.save_core is not None and llm.core_set is not None:
            llm.core_set.save(args.save_core)  # last: the answer is out, whatever the disk says
    return 0


def _core_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> CoreConfig:
    values = options.given(args, CoreConfig)
    mode = values.setdefault("mode", DEFAULT_CORE_MODE)
    idle = [f"--{name}" for name in values if name != "mode"]
    if mode == "off" and idle:
        parser.error(f"{', '.join(idle)}: no effect without --core stable")
    if args.core_file is not None and mode != "off":
        parser.error("--core-file and --core stable exclude each other")
    if args.save_core is not None and mode == "off" and args.core_file is None:
        parser.error("--save-core: there is no core set without --core stable")
    return options.make(parser, CoreConfig, values)


def _prompt(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    if args.stdin not in (None, "-"):
        parser.error(f"unrecognized argument {args.stdin!r}; give the prompt as -p TEXT")
    sources = [s for s in (args.prompt, args.file, args.stdin) if s is not None]
    if len(sources) != 1:
        parser.error("give the prompt as one of -p TEXT, -f FILE or -")
    if args.prompt is not None:
        raw = os.fsencode(args.prompt)
    elif args.file is not None:
        with open(args.file, "rb") as file:
            raw = file.read()
    else:
        raw = options.read_stdin()
    if not raw:
        raise ValueError("the prompt is empty; give some text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8: {error}") from error


def _answer(
    llm: Llama,
    args: argparse.Namespace,
    prompt: str,
    sampling: SamplingConfig,
    line: ProgressLine,
) -> TextStream:
    """Generate, writing the text as it comes unless `--json`; returns the text stream."""
    if not args.raw and llm.has_chat_template:
        ids = llm.chat_prompt_ids([{"role": "user", "content": prompt}])
    else:
        ids = llm.prompt_ids(prompt)
    stream = llm.text_stream(ids, sampling, max_tokens=args.max_tokens, stop=args.stop)
    for text, _ in stream:
        line.clear()
        if not args.json:
            sys.stdout.write(text)
            sys.stdout.flush()
    line.clear()
    return stream


def _facts(llm: Llama, stream: TextStream) -> dict[str, Any]:
    from .. import _core

    timings = llm.timings
    backend = llm.backend
    return {
        "model": llm.model_path,
        "text": stream.text,
        "ids": stream.ids,
        "finish_reason": stream.finish_reason,
        "prompt_tokens": timings.reused_tokens + timings.prefill_tokens,
        "backend": {"name": backend.name, "isa": backend.isa, "n_threads": backend.n_threads},
        "core": _core_facts(llm),
        "timings": timings.as_dict(),
        "peak_memory_bytes": _core.memory()["peak_rss"],
    }


def _core_facts(llm: Llama) -> dict[str, Any] | None:
    core = llm.core_set
    if core is None:
        return None
    return {
        "statistic": core.statistic,
        "alpha": core.alpha,
        "beta": core.beta,
        "sizes": core.sizes,
        "n_ff": core.n_ff,
        "kept": core.kept,
        "stability": core.stability,
    }


def summary(facts: dict[str, Any]) -> str:
    """The lines for stderr: backend, prompt, neurons, decoding, memory."""
    backend, core, t = facts["backend"], facts["core"], facts["timings"]
    dense, now = t["dense_weight_bytes"] / 1e6, t["decode_weight_bytes"] / 1e6
    lines = [
        f"backend  {backend['name']} {backend['isa']}, {backend['n_threads']} threads",
        f"prompt   {facts['prompt_tokens']} tokens, {t['prefill_tokens_per_second']:.1f} tok/s",
    ]
    if core is None:
        lines.append(f"neurons  all (dense), {dense:.1f} MB of weights a token")
    else:
        stability = "" if core["stability"] is None else f", stability {core['stability']:.2f}"
        lines.append(
            f"neurons  {sum(core['sizes'])} of {core['n_ff'] * len(core['sizes'])} kept "
            f"({100 * core['kept']:.0f} %), {dense:.1f} -> {now:.1f} MB of weights a token"
            + stability
        )
    lines += [
        f"decode   {t['decode_tokens']} tokens, {t['decode_tokens_per_second']:.1f} tok/s, "
        f"{t['decode_gb_per_second']:.1f} GB/s",
        f"memory   {facts['peak_memory_bytes'] / 1e6:.0f} MB at most",
    ]
    return "\n".join(lines)
