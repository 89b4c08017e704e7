"""`coreinfer run MODEL`: answer a prompt, streaming the text; a summary goes to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from ..config import (
    CORE_PRESETS,
    DEFAULT_CORE_MODE,
    FIELDS_OF_MODES,
    CoreConfig,
    LoadConfig,
    SamplingConfig,
)
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
    core.add_argument(
        "--clusters",
        metavar="FILE",
        help="clusters for --core similar or auto, which `coreinfer cluster build` made; the patch "
        "of --core stable learns from their texts",
    )
    core.add_argument(
        "--embedder",
        metavar="NAME|PATH",
        help=options.EMBEDDER_HELP + " (default: the one that the clusters name)",
    )
    core.add_argument(
        "--tuning",
        metavar="FILE",
        help="for --core auto: what `coreinfer tune` wrote (default: the file beside the model)",
    )
    core.add_argument(
        "--preset",
        choices=CORE_PRESETS,
        help="settings of the paper, whatever the defaults are: --core stable --statistic count "
        "--alpha 0.4 --beta 0.4 --gamma 0.4 --blend 0 --first-layer 1 --patch off; other flags "
        "change them",
    )
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
    if args.save_core is not None:
        options.writable(args.save_core, args.model, args.file, args.clusters, args.tuning)

    from ..core_sets import CoreSet
    from ..llama import Llama

    handed_in = None if args.core_file is None else CoreSet.load(args.core_file)
    line = ProgressLine("reading the prompt", "tokens")
    with Llama(
        resolve(args.model),
        **vars(load),
        core=core if handed_in is None else handed_in,
        clusters=args.clusters,
        embedder=args.embedder,
        tuning=args.tuning,
        verbose=False,
        prefill_progress=line,
    ) as llm:
        result = _answer(llm, args, prompt, sampling, line)
        facts = _facts(llm, result)
        print(json.dumps(facts, ensure_ascii=False) if args.json else "", flush=True)
        options.say(summary(facts))
        # Last: the answer is out, whatever the disk says.
        if args.save_core is not None:
            if llm.core_set is None:
                raise ValueError(
                    f"--save-core: nothing was saved, since no neurons were chosen: the answer "
                    f"ended within --start {facts['start']}"
                )
            llm.core_set.save(args.save_core)
    return 0


def _flag(name: str, value: Any) -> str:
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def _core_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> CoreConfig:
    values = options.given(args, CoreConfig)
    asked = values.get("mode", "stable" if args.preset else "off")
    mode = values.setdefault("mode", "stable" if args.preset else DEFAULT_CORE_MODE)
    if args.core_file is not None:
        if asked != "off":
            other = "--preset" if args.preset else f"--core {mode}"
            parser.error(f"--core-file and {other} exclude each other")
        others = {name: getattr(args, name) for name in ("clusters", "embedder", "tuning")}
        given = {**values, **{name: value for name, value in others.items() if value is not None}}
        idle = [_flag(name, given[name]) for name in given if name != "mode"]
        if idle:
            parser.error(f"{', '.join(idle)}: no effect with --core-file, which has the neurons")
    for wanted, names in FIELDS_OF_MODES.items():
        idle = [_flag(n, values[n]) for n in names if n in values and mode not in wanted]
        if idle:
            parser.error(f"{', '.join(idle)}: no effect without --core {' or '.join(wanted)}")
    if args.preset and mode not in ("stable", "similar"):
        parser.error("--preset: no effect without --core stable or similar")
    has_set = mode in ("stable", "similar") or args.core_file is not None
    if args.save_core is not None and not has_set:
        parser.error("--save-core: there is no core set without --core stable or similar")
    if mode == "similar" and args.clusters is None:
        parser.error("--core similar needs --clusters FILE (coreinfer cluster build makes one)")
    if mode not in ("similar", "auto", "stable") and args.clusters:
        parser.error("--clusters: no effect without --core similar, stable or auto")
    if mode not in ("similar", "auto") and args.embedder:
        parser.error("--embedder: no effect without --core similar or auto")
    if mode != "auto" and args.tuning:
        parser.error("--tuning: no effect without --core auto")
    preset = vars(CoreConfig.preset(args.preset, mode)) if args.preset else {}
    return options.make(parser, CoreConfig, {**preset, **values})


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
    stream = llm.text_stream(ids, sampling, max_tokens=args.max_tokens, stop=args.stop, text=prompt)
    for text, _ in stream:
        line.clear()
        if not args.json:
            sys.stdout.write(text)
            sys.stdout.flush()
    line.clear()
    return stream


def _facts(llm: Llama, stream: TextStream) -> dict[str, Any]:
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
        "start": _start(llm),
        "stability": llm.stability,
        "auto": _auto_facts(llm),
        "clusters": None if llm.clusters is None else llm.clusters.n_clusters,
        "timings": timings.as_dict(),
        "drafting": llm.drafting,
    }


def _start(llm: Llama) -> int:
    """Tokens that the answer was to begin with, dense."""
    core = llm.core if llm.decision is None else llm.decision.config
    return core.start if isinstance(core, CoreConfig) else 0


def _auto_facts(llm: Llama) -> dict[str, Any] | None:
    decision = llm.decision
    if decision is None:
        return None
    return {"mode": decision.config.mode, "reason": decision.reason, "kl": decision.kl}


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
        "weighted": core.weighted,
        "patch_rank": core.patch_rank,
        "stability": core.stability,
        "cluster": core.cluster,
        "cluster_similarity": core.cluster_similarity,
    }


def _drafts(t: dict[str, Any], drafting: dict[str, dict[str, Any]]) -> str:
    words = "none"
    if t["drafted_tokens"]:
        words = (
            f"{t['accepted_tokens']} of {t['drafted_tokens']} came true in "
            f"{t['verifications']} verifications"
        )
    if drafting["core"]["gain"] <= 1.0:
        words += "; those of the core neurons would not pay here, and dense decoding goes without"
    return words


def summary(facts: dict[str, Any]) -> str:
    """The lines for stderr: backend, prompt, neurons, decoding, memory."""
    backend, core, t = facts["backend"], facts["core"], facts["timings"]
    dense, now = t["dense_weight_bytes"] / 1e6, t["decode_weight_bytes"] / 1e6
    lines = [
        f"backend  {backend['name']} {backend['isa']}, {backend['n_threads']} threads",
        f"prompt   {facts['prompt_tokens']} tokens, {t['prefill_tokens_per_second']:.1f} tok/s"
        + ("" if facts["stability"] is None else f", stability {facts['stability']:.2f}"),
    ]
    if facts["auto"] is not None:
        lines.append(f"auto     {facts['auto']['mode']}: {facts['auto']['reason']}")
    if core is None:
        begun = f": the answer ended within its first {facts['start']} tokens"
        why = begun if facts["start"] else ""
        lines.append(f"neurons  all (dense{why}), {dense:.1f} MB of weights a token")
    else:
        lines.append(
            f"neurons  {sum(core['sizes'])} of {core['n_ff'] * len(core['sizes'])} kept "
            f"({100 * core['kept']:.0f} %), {dense:.1f} -> {now:.1f} MB of weights a token"
        )
        if core["patch_rank"]:
            lines.append(
                f"patch    rank {core['patch_rank']}, {1e3 * t['patch_seconds']:.0f} ms, "
                f"{t['patch_bytes'] / 1e6:.1f} MB of those a token"
            )
        if core["cluster"] is not None:
            lines.append(
                f"cluster  {core['cluster']} of {facts['clusters']}, similarity "
                f"{core['cluster_similarity']:.2f}; {1e3 * t['embed_seconds']:.1f} ms to embed the "
                f"prompt, {1e3 * t['lookup_seconds']:.1f} ms to look up"
            )
    if facts["drafting"] is not None:
        lines.append(f"drafts   {_drafts(t, facts['drafting'])}")
    if t["replay_tokens"]:
        lines.append(f"replay   {t['replay_tokens']} tokens, {t['replay_seconds']:.2f} s")
    lines += [
        f"decode   {t['decode_tokens']} tokens, {t['decode_tokens_per_second']:.1f} tok/s, "
        f"{t['decode_gb_per_second']:.1f} GB/s",
        f"memory   {t['resident_bytes'] / 1e6:.0f} MB now, "
        f"{t['peak_resident_bytes'] / 1e6:.0f} MB at most",
    ]
    return "\n".join(lines)
