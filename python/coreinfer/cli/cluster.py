"""`coreinfer cluster build MODEL` and `cluster info FILE`: make and show clusters of texts.

`build` reads texts from JSON lines, clusters them, and writes what their clusters activate to one
file, at the very end: an interrupted build leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from ..config import CoreConfig, LoadConfig
from ..embedders import DEFAULT_EMBEDDER
from ..patch_prior import PATCH_ROWS
from . import options
from .progress import ProgressLine
from .pull import resolve

# Not `seed`: the sampler's, where a build's is that of the clusters.
_LOADING = ("n_ctx", "n_batch", "n_threads", "n_gpu_layers", "main_gpu", "vram_limit")
_LOADING += ("memory_limit", "activation", "f32_activations")
_COUNTING = ("statistic", "alpha", "weighted", "beta")


def add_parser(commands: argparse._SubParsersAction) -> None:
    cluster = commands.add_parser(
        "cluster",
        allow_abbrev=False,
        help="make clusters for similarity-guided decoding, or show them",
        description="Clusters of texts and the neurons they activate, for run --core similar.",
    )
    actions = cluster.add_subparsers(
        title="actions", dest="action", metavar="ACTION", required=True
    )
    _add_build(actions)
    info = actions.add_parser(
        "info",
        allow_abbrev=False,
        help="show what a file of clusters holds",
        description="Print what a file of clusters holds.",
    )
    info.add_argument("file", metavar="FILE", help="a file that build made")
    info.add_argument("--json", action="store_true", help="print one JSON object instead")
    info.set_defaults(call=call_info, parser=info)


def _add_build(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "build",
        allow_abbrev=False,
        help="make clusters of a model and a set of texts",
        description=(
            "Cluster texts by their sentence embeddings, read each with the model, and store what "
            "every cluster activates. Needs the extra `similarity`."
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="a GGUF file or a known model's name")
    parser.add_argument("--data", required=True, metavar="FILE", help="texts as JSON lines")
    parser.add_argument(
        "--field", required=True, metavar="NAME", help="the field of a line that holds its text"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write (.npz)")
    parser.add_argument("--limit", type=_count, metavar="N", help="use the first N lines")
    parser.add_argument(
        "--raw", action="store_true", help="read the texts as they are, without chat template"
    )
    group = parser.add_argument_group("clusters")
    group.add_argument(
        "--by",
        choices=("embedding", "neurons"),
        default="embedding",
        help="what texts are compared by: sentence embeddings, or the neurons that each activates "
        "most, which needs no embedder but the prompt's own neurons at run time "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--embedder",
        metavar="NAME|PATH",
        help=f"{options.EMBEDDER_HELP} (default: {DEFAULT_EMBEDDER})",
    )
    group.add_argument(
        "--clusters",
        type=_count_or_auto,
        default="auto",
        metavar="auto|K",
        help="number of clusters; auto takes the one of the best silhouette (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="INT",
        help="seed of the clustering (default: %(default)s)",
    )
    group.add_argument(
        "--patch-rows",
        type=int,
        default=PATCH_ROWS,
        metavar="N",
        help="rows that patches learn from beside a prompt's own tokens; 0 for none "
        "(default: %(default)s)",
    )
    options.add_flags(
        group,
        CoreConfig,
        names=_COUNTING,
        helps={"beta": "share of a layer's neurons that a text is known by, with --by neurons"},
    )
    options.add_flags(parser.add_argument_group("model"), LoadConfig, names=_LOADING)
    parser.set_defaults(call=call_build, parser=parser)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a positive integer")
    return int(text)


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def call_build(args: argparse.Namespace) -> int:
    if not 0 <= args.seed < 1 << 32:
        args.parser.error(f"--seed is {args.seed}; expected an integer from 0 to {(1 << 32) - 1}")
    counting = options.make(args.parser, CoreConfig, options.given(args, CoreConfig))
    load = options.make(args.parser, LoadConfig, options.given(args, LoadConfig))
    if args.by == "embedding" and args.beta is not None:
        args.parser.error("--beta: no effect without --by neurons")
    if args.by == "neurons" and args.embedder is not None:
        args.parser.error("--embedder: no effect without --by embedding")
    out = options.writable(args.out, args.model, args.data)
    texts = read_texts(args.data, args.field, args.limit)

    from ..llama import Llama
    from ..similarity import build_clusters

    line = ProgressLine("reading the texts", "texts")
    with Llama(resolve(args.model), **vars(load), verbose=False) as llm:
        try:
            clusters = build_clusters(
                llm,
                texts,
                by=args.by,
                embedder=DEFAULT_EMBEDDER if args.embedder is None else args.embedder,
                n_clusters=args.clusters,
                statistic=counting.statistic,
                alpha=counting.alpha,
                weighted=counting.weighted,
                beta=counting.beta,
                chat=llm.has_chat_template and not args.raw,
                patch_rows=args.patch_rows,
                random_state=args.seed,
                progress=line,
            )
        finally:
            line.clear()
    clusters.save(out)
    options.say(f"{out}: {clusters.n_clusters} clusters of {len(texts)} texts")
    return 0


def read_texts(path: str, field: str, limit: int | None = None) -> list[str]:
    """The texts in `field` of a file's JSON lines; ValueError naming the line of a bad one."""
    texts = []
    with open(path, "rb") as file:
        for i, line in enumerate(file):
            if limit is not None and len(texts) == limit:
                break
            if not line.strip():
                continue
            where = f"{path}, line {i + 1}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict) or field not in row:
                names = ", ".join(row) if isinstance(row, dict) else "it is no object"
                raise ValueError(f"{where}: there is no field {field!r} ({names:.200})")
            if not isinstance(row[field], str) or not row[field].strip():
                raise ValueError(f"{where}: {field} is {row[field]!r:.80}; expected some text")
            try:
                row[field].encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where}: {field} is no valid text: {error}") from error
            texts.append(row[field])
    if not texts:
        raise ValueError(f"{path}: the file holds no text")
    return texts


def call_info(args: argparse.Namespace) -> int:
    from ..clusters import Clusters

    clusters = Clusters.load(args.file)
    facts = {
        "path": args.file,
        "bytes": os.path.getsize(args.file),
        "n_clusters": clusters.n_clusters,
        "n_texts": clusters.n_texts.tolist(),
        "by": clusters.by,
        "embedder": clusters.embedder or None,
        "n_features": clusters.n_features,
        "beta": clusters.beta or None,
        "statistic": clusters.statistic,
        "alpha": clusters.alpha,
        "weighted": clusters.weighted,
        "patch_rows": 0 if clusters.prior is None else clusters.prior.n_rows,
        "chat": clusters.chat,
        "n_layer": clusters.n_layer,
        "n_ff": clusters.n_ff,
        "fingerprint": None if clusters.fingerprint is None else f"{clusters.fingerprint:016x}",
    }
    print(json.dumps(facts, ensure_ascii=False) if args.json else _text(facts))
    return 0


def _text(facts: dict[str, Any]) -> str:
    compared = (
        f"embeddings of {facts['embedder']}, {facts['n_features']} dimensions"
        if facts["by"] == "embedding"
        else f"the {100 * facts['beta']:g} % of neurons that each activates most"
    )
    model = facts["fingerprint"] or "any"
    weighted = "weighted, " if facts["weighted"] else ""
    return "\n".join(
        [
            f"file       {facts['path']} ({facts['bytes'] / 1e6:.1f} MB)",
            f"clusters   {facts['n_clusters']}, of {', '.join(map(str, facts['n_texts']))} texts",
            f"compared   by {compared}",
            f"prior      {facts['patch_rows']} rows that patches learn from",
            f"counted    {facts['statistic']}, {weighted}alpha {facts['alpha']:g}, "
            + ("through the chat template" if facts["chat"] else "texts as they are"),
            f"model      {facts['n_layer']} layers of {facts['n_ff']} neurons, fingerprint {model}",
        ]
    )
