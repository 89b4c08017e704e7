"""`coreinfer tune MODEL --text FILE`: measure what core settings cost and gain on a user's text.

The table goes to stdout, progress to stderr; what was measured goes to a small file beside the
model, which `core="auto"` then goes by.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

from ..config import CoreConfig, LoadConfig, SamplingConfig
from ..sidecar import write_replacing
from ..tuning import (
    ANSWER_TOKENS,
    BETAS,
    EXPECTED_ANSWER,
    PROMPT_TOKENS,
    STARTS,
    TEMPERATURES,
    Choice,
    Row,
    Tuning,
    gain,
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
    "activation",
    "f32_activations",
)
_LISTS = {  # the flags of fields that take a list here
    "beta": "--betas",
    "statistic": "--statistics",
    "first_layer": "--first-layers",
    "patch": "--patches",
    "gamma": "--gammas",
    "start": "--starts",
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
    add_list = partial(_add_list, parser)
    add_list("--betas", float, BETAS, "B,B", "shares of neurons to measure")
    add_list("--statistics", str, (CoreConfig.statistic,), "S,S", "how neurons are ranked")
    add_list(
        "--weighted",
        _switch,
        (CoreConfig.weighted,),
        "W,W",
        "off, on: rank neurons by what they write, too",
    )
    add_list(
        "--first-layers",
        float,
        (CoreConfig.first_layer,),
        "T,T",
        "times as many neurons in the first layer",
    )
    add_list("--patches", str, (CoreConfig.patch,), "P,P", "on, off or ranks of the patch")
    add_list(
        "--starts",
        int,
        STARTS,
        "N,N",
        "tokens of the answer that stay dense before neurons are chosen by them, too",
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
        help=f"shares of a cluster's neurons to measure (default: {_listed(BETAS)})",
    )
    parser.add_argument(
        "--layers",
        action="append",
        metavar="A:B",
        help="layers that take part, beside all of them; repeatable",
    )
    add_list("--prompts", int, PROMPT_TOKENS, "N,N", "prompt lengths in tokens")
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
    add_list(
        "--temps",
        float,
        TEMPERATURES,
        "T,T",
        "temperatures that the answers are drawn at, each for answers drawn at as much or less; 0 "
        "takes the likeliest tokens, whose text repeats itself",
    )
    options.add_flags(parser.add_argument_group("choice"), CoreConfig, names=("max_kl",))
    options.add_flags(parser.add_argument_group("model"), LoadConfig, names=_LOADING)
    parser.set_defaults(call=call, parser=parser)


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text == "on"


def _add_list(
    parser: argparse.ArgumentParser,
    flag: str,
    kind: Callable[[str], Any],
    default: Sequence[Any],
    metavar: str,
    does: str,
) -> None:
    """A flag that takes a list of values, parted by commas; its help says the default."""
    parser.add_argument(
        flag,
        type=_list_of(kind),
        default=default,
        metavar=metavar,
        help=f"{does} (default: {_listed(default)})",
    )


def _listed(values: Sequence[Any]) -> str:
    """A list as it is written after its flag."""
    switch = ("off", "on")
    words = [
        switch[v] if isinstance(v, bool) else f"{v:g}" if isinstance(v, float) else str(v)
        for v in values
    ]
    return ",".join(words)


def _list_of(kind: Callable[[str], Any]):
    def parse(text: str) -> tuple:
        try:
            values = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
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
        allowed = options.make(parser, CoreConfig, {"mode": "auto", "max_kl": args.max_kl}).max_kl
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
                "start": start,
            },
            _LISTS,
        )
        for statistic, weighted, layers, first_layer, patch, start, beta in product(
            args.statistics,
            args.weighted,
            [None, *(args.layers or ())],
            args.first_layers,
            args.patches,
            args.starts,
            args.betas,
        )
    ]
    if args.clusters is not None:
        configs += [
            options.make(
                parser,
                CoreConfig,
                {
                    "mode": "similar",
                    "gamma": gamma,
                    "first_layer": first_layer,
                    "patch": patch,
                    "start": start,
                },
                _LISTS,
            )
            for first_layer, patch, start, gamma in product(
                args.first_layers, args.patches, args.starts, args.gammas or BETAS
            )
        ]
    elif args.gammas is not None or args.embedder is not None:
        idle = "--gammas" if args.gammas is not None else "--embedder"
        parser.error(f"{idle}: no effect without --clusters")
    configs = list(dict.fromkeys(configs))  # as of --patches on,64
    for temperature in args.temps:
        options.make(
            parser, SamplingConfig, {"temperature": temperature}, {"temperature": "--temps"}
        )
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
            temperatures=args.temps,
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
        n_whole = args.n_answer + max(args.starts)
        options.say(
            f"prompts of {', '.join(map(str, left_out))} tokens were left out: the text has fewer, "
            f"or the context has no room for them and {n_whole} of the answer"
        )
    digest = rows[-1].clusters
    for temperature in args.temps:
        choose = partial(tuning.choose, allowed, temperature=temperature)
        within = f"within KL {allowed:g} at temperature {temperature:g}"
        options.say(f"{within}: {_found(choose(clusters=digest) or choose(), 'prompt')}")
        if args.clusters is not None:
            similar = choose(mode="similar", clusters=digest)
            options.say(f"{within}: {_found(similar, 'cluster')}")
    options.say(f"wrote {os.fspath(path)}")
    return 0


def _found(choice: Choice | None, whose: str) -> str:
    if choice is None:
        return (
            f"nothing with the {whose}'s neurons is faster than dense for an answer of "
            f"{EXPECTED_ANSWER} tokens"
        )
    share, near, after = choice.config.beta, "", ""
    if choice.config.start:
        after = f", after {choice.config.start} dense tokens"
    if choice.cluster_similarity is not None:
        share, near = choice.config.gamma, f" and similarity {choice.cluster_similarity:.2f}"
    speed = gain(choice, EXPECTED_ANSWER)
    return (
        f"{share:g} of the {whose}'s neurons from {choice.n_prompt} prompt tokens{near} on{after} "
        f"(measured {choice.kl:.3f}, and {speed:.2f} times dense decoding's speed for an answer of "
        f"{EXPECTED_ANSWER} tokens)"
    )


def table(rows: list[Row]) -> str:
    """The rows in Markdown, by prompt length."""
    lines = [
        "| prompt | temp | statistic | weighted | layers | first layer | patch | start | beta "
        "| KL to dense | agreement | weights read | speed | choosing, in tokens "
        f"| speed of {EXPECTED_ANSWER} |",
        "| --- " * 15 + "|",
    ]
    for row in rows:
        c = row.config
        layers = "all" if c.layers is None else f"{c.layers[0]}:{c.layers[1] or ''}"
        weighted = "on" if c.weighted else "off"
        counted = f"{c.statistic} | {weighted}" if c.mode == "stable" else "clusters | as built"
        lines.append(
            f"| {row.n_prompt} | {row.temperature:g} | {counted} | {layers} | × {c.first_layer:g} "
            f"| {c.patch or 'off'} | {c.start} | {c.gamma if c.mode == 'similar' else c.beta:g} "
            f"| {row.kl:.4f} ± {row.kl_error:.4f} | {row.agreement:.3f} "
            f"| {row.weight_share:.2f} | {row.speed:.2f} | {row.choosing:.1f} "
            f"| {gain(row, EXPECTED_ANSWER):.2f} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], allowed: float, path: str) -> None:
    """KL against speed, a line a prompt length, temperature and start, to a PNG file.

    OSError if the system refuses.
    """
    figure = _figure()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[int, float, int], list[tuple[float, float]]] = {}
    for row in rows:
        line = lines.setdefault((row.n_prompt, row.temperature, row.config.start), [])
        line.append((gain(row, EXPECTED_ANSWER), row.kl))
    for (n_prompt, temperature, start), points in lines.items():
        after = f", after {start} of the answer" if start else ""
        label = f"{n_prompt} tokens, temperature {temperature:g}{after}"
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.axhline(allowed, linestyle="--", color="grey", label="allowed")
    speed = f"speed over dense decoding, {EXPECTED_ANSWER} tokens"
    axes.set(xlabel=speed, ylabel="KL to dense decoding, nats", yscale="log")
    axes.legend()
    write_replacing(path, "plot", lambda file: figure.savefig(file, format="png", dpi=120))


def _figure() -> Any:
    """Matplotlib's `Figure`; ImportError that names the extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'coreinfer-cpp[plot]'") from error
    return Figure
