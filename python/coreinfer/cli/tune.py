"""`coreinfer tune MODEL --text FILE`: measure what core settings cost and gain on a user's text.

The table goes to stdout, progress to stderr; what was measured goes to a small file beside the
model, which `core="auto"` then goes by.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from itertools import product
from typing import Any

from ..config import CoreConfig, LoadConfig
from ..sidecar import write_replacing
from ..tuning import (
    ANSWER_TOKENS,
    BETAS,
    PROMPT_TOKENS,
    Choice,
    Row,
    Tuning,
    measure,
    tuning_path,
)
from . import options
from .progress import ProgressLine
from .pull import resolve

_LOADING = (
    "n_ctx",
    "n_batch",
    "n_threads",
    "n_gpu_layers",
    "main_gpu",
    "vram_limit",
    "f32_activations",
)
_LISTS = {  # the flags of fields that take a list here
    "beta": "--betas",
    "statistic": "--statistics",
    "first_layer": "--first-layers",
    "patch": "--patches",
    "gamma": "--gammas",
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tune",
        allow_abbrev=False,
        help="measure core settings on a text of yours, for --core auto",
        description=(
            "Measure how far decoding with core neurons is from dense decoding, and how much "
            "faster, on a text of yours. Writes what was measured beside the model, where "
            "--core auto finds it. Unless asked, only the share of neurons varies, with the "
            "defaults for all else: every list multiplies the time."
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="a GGUF file or a known model's name")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to measure on")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: beside the model)")
    parser.add_argument("--plot", metavar="FILE", help="draw quality against speed to a PNG file")
    parser.add_argument(
        "--betas",
        type=_list_of(float),
        default=BETAS,
        metavar="B,B",
        help="shares of neurons to measure (default: 0.2,0.4,0.6,0.8,0.9)",
    )
    parser.add_argument(
        "--statistics",
        type=_list_of(str),
        default=(CoreConfig.statistic,),
        metavar="S,S",
        help="how neurons are ranked (default: flock)",
    )
    parser.add_argument(
        "--weighted",
        type=_list_of(_switch),
        default=(CoreConfig.weighted,),
        metavar="W,W",
        help="off, on: rank neurons by what they write, too (default: off)",
    )
    parser.add_argument(
        "--first-layers",
        type=_list_of(float),
        default=(CoreConfig.first_layer,),
        metavar="T,T",
        help="times as many neurons in the first layer (default: 2)",
    )
    parser.add_argument(
        "--patches",
        type=_list_of(str),
        default=(CoreConfig.patch,),
        metavar="P,P",
        help="on, off or ranks of the patch (default: on)",
    )
    parser.add_argument(
        "--clusters",
        metavar="FILE",
        help="measure decoding with the neurons of these clusters, too",
    )
    parser.add_argument(
        "--embedder",
        metavar="NAME|PATH",
        help=options.EMBEDDER_HELP + " (default: the one that the clusters name)",
    )
    parser.add_argument(
        "--gammas",
        type=_list_of(float),
        metavar="G,G",
        help="shares of a cluster's neurons to measure (default: 0.2,0.4,0.6,0.8,0.9)",
    )
    parser.add_argument(
        "--layers",
        action="append",
        metavar="A:B",
        help="layers that take part, beside all of them; repeatable",
    )
    parser.add_argument(
        "--prompts",
        type=_list_of(int),
        default=PROMPT_TOKENS,
        metavar="N,N",
        help="prompt lengths in tokens (default: 64,128,256)",
    )
    parser.add_argument(
        "--texts", type=int, default=8, metavar="N", help="prompts of each length (default: 8)"
    )
    parser.add_argument(
        "-n",
        dest="n_answer",
        type=int,
        default=ANSWER_TOKENS,
        metavar="N",
        help="answer tokens compared per prompt (default: %(default)s)",
    )
    options.add_flags(parser.add_argument_group("choice"), CoreConfig, names=("max_kl",))
    options.add_flags(parser.add_argument_group("model"), LoadConfig, names=_LOADING)
    parser.set_defaults(call=call, parser=parser)


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text == "on"


def _list_of(kind: Callable[[str], Any]):
    def parse(text: str) -> tuple:
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {kind.__name__}") from None
        return values

    return parse


def call(args: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = args.parser
    load = options.make(parser, LoadConfig, options.given(args, LoadConfig))
    # Not all that is given: other fields' flags are lists here.
    allowed = CoreConfig.max_kl
    if args.max_kl is not None:
        allowed = options.make(parser, CoreConfig, {"max_kl": args.max_kl}).max_kl
    configs = [
        options.make(
            parser,
            CoreConfig,
            {
                "beta": beta,
                "statistic": statistic,
                "weighted": weighted,
                "layers": layers,
                "first_layer": first_layer,
                "patch": patch,
            },
            _LISTS,
        )
        for statistic, weighted, layers, first_layer, patch, beta in product(
            args.statistics,
            args.weighted,
            [None, *(args.layers or ())],
            args.first_layers,
            args.patches,
            args.betas,
        )
    ]
    if args.clusters is not None:
        configs += [
            options.make(
                parser,
                CoreConfig,
                {"mode": "similar", "gamma": gamma, "first_layer": first_layer, "patch": patch},
                _LISTS,
            )
            for first_layer, patch, gamma in product(
                args.first_layers, args.patches, args.gammas or BETAS
            )
        ]
    elif args.gammas is not None or args.embedder is not None:
        idle = "--gammas" if args.gammas is not None else "--embedder"
        parser.error(f"{idle}: no effect without --clusters")
    prompts = [("--prompts", n) for n in args.prompts]
    for name, value in (("--texts", args.texts), ("-n", args.n_answer), *prompts):
        if value < 2:
            parser.error(f"{name} is {value}; expected at least 2")
    with open(args.text, "rb") as file:
        text = file.read()
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.text}: not UTF-8: {error}") from error
    read = (args.model, args.text, args.clusters)
    # What would lose an hour's measurement is said before it.
    if args.plot is not None:
        options.writable(args.plot, args.out, *read)
        _figure()
    path = None if args.out is None else options.writable(args.out, *read)
    model = resolve(args.model)
    if path is None:
        try:
            path = options.writable(tuning_path(model), args.plot, *read)
        except ValueError as error:
            raise ValueError(f"{error}; give --out a place of your own") from None

    from ..llama import Llama

    line = ProgressLine("measuring", "settings")
    with Llama(
        model,
        **vars(load),
        core="off",
        clusters=args.clusters,
        embedder=args.embedder,
        verbose=False,
    ) as llm:
        ids = llm.checked_ids(llm.tokenize(text, add_bos=False, special=False))
        rows = []
        for row in measure(
            llm,
            ids,
            configs,
            n_prompts=args.prompts,
            n_texts=args.texts,
            n_answer=args.n_answer,
            bos=llm.tokenizer().bos_id if llm.tokenizer().add_bos else None,
            progress=line,
        ):
            rows.append(row)
        line.clear()
        tuning = Tuning(llm.fingerprint, tuple(rows))
    try:
        tuning.save(path)
    finally:
        print(table(rows), flush=True)
    if args.plot is not None:
        draw(rows, allowed, args.plot)
    left_out = sorted(set(args.prompts) - {row.n_prompt for row in rows})
    if left_out:
        options.say(
            f"prompts of {', '.join(map(str, left_out))} tokens were left out: the text has fewer, "
            f"or the context has no room for them and {args.n_answer} of the answer"
        )
    digest = rows[-1].clusters
    own = tuning.choose(allowed, clusters=digest) or tuning.choose(allowed)
    options.say(_found(own, "prompt", allowed))
    if args.clusters is not None:
        similar = tuning.choose(allowed, mode="similar", clusters=digest)
        options.say(_found(similar, "cluster", allowed))
    options.say(f"wrote {os.fspath(path)}")
    return 0


def _found(choice: Choice | None, whose: str, allowed: float) -> str:
    if choice is None:
        return f"within KL {allowed:g}: nothing with the {whose}'s neurons is faster than dense"
    share, near = choice.config.beta, ""
    if choice.cluster_similarity is not None:
        share, near = choice.config.gamma, f" and similarity {choice.cluster_similarity:.2f}"
    return (
        f"within KL {allowed:g}: {share:g} of the {whose}'s neurons from {choice.n_prompt} prompt "
        f"tokens{near} on (measured {choice.kl:.3f})"
    )


def table(rows: list[Row]) -> str:
    """The rows in Markdown, by prompt length."""
    lines = [
        "| prompt | statistic | weighted | layers | first layer | patch | beta | KL to dense "
        "| agreement | weights read | speed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        c = row.config
        layers = "all" if c.layers is None else f"{c.layers[0]}:{c.layers[1] or ''}"
        weighted = "on" if c.weighted else "off"
        counted = f"{c.statistic} | {weighted}" if c.mode == "stable" else "clusters | as built"
        lines.append(
            f"| {row.n_prompt} | {counted} | {layers} | × {c.first_layer:g} "
            f"| {c.patch or 'off'} | {c.gamma if c.mode == 'similar' else c.beta:g} "
            f"| {row.kl:.4f} ± {row.kl_error:.4f} | {row.agreement:.3f} "
            f"| {row.weight_share:.2f} | {row.speed:.2f} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], allowed: float, path: str) -> None:
    """KL against speed, a line a prompt length, to a PNG file; OSError if the system refuses."""
    figure = _figure()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for n_prompt in dict.fromkeys(row.n_prompt for row in rows):
        points = sorted((r.speed, r.kl) for r in rows if r.n_prompt == n_prompt)
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{n_prompt} prompt tokens")
    axes.axhline(allowed, linestyle="--", color="grey", label="allowed")
    axes.set(xlabel="speed over dense decoding", ylabel="KL to dense decoding, nats", yscale="log")
    axes.legend()
    write_replacing(path, "plot", lambda file: figure.savefig(file, format="png", dpi=120))


def _figure() -> Any:
    """Matplotlib's `Figure`; ImportError that names the extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'coreinfer-cpp[plot]'") from error
    return Figure
