"""How close similarity-guided decoding stays to dense, beside stability-guided, by prompt length.

In: a GGUF model, clusters that `coreinfer cluster build` made with it, and texts as JSON lines that
the clusters have not seen. A prompt is the last n tokens of a text (0: all of it), BOS first where
the tokenizer adds one; the continuation is the model's own greedy one. Out: a Markdown table of KL
to dense and agreement with dense, means over prompts with the standard error of the KL. The first
position comes from the dense prefill and is left out. BLEND is the weight of the prompt's own
neurons: 0 is the cluster alone.

    python tools/measure_similarity.py MODEL.gguf CLUSTERS.npz --data FILE.jsonl \
        --fields context question --lengths 8 16 32 64 128 --blends 0 0.5 --share 0.4
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from coreinfer import Clusters, CoreConfig, Llama
from coreinfer.tuning import divergence

Way = TypeVar("Way", bound=Hashable)


def read_texts(path: str, fields: list[str]) -> list[str]:
    """The fields of every line, joined by line breaks."""
    rows = [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line.strip()]
    return ["\n".join(row[field] for field in fields) for row in rows]


def cut_prompts(llm: Llama, texts: list[str], length: int, n_prompts: int) -> list[np.ndarray]:
    """The last `length` ids of the first texts that have as many; all ids for 0.

    Where the tokenizer adds BOS, it is the first of them, as in any prompt.
    """
    n_bos = int(llm.tokenizer().add_bos)

    def end(ids: np.ndarray) -> np.ndarray:
        return np.concatenate([ids[:n_bos], ids[ids.size - length + n_bos :]]) if length else ids

    ids = (llm.prompt_ids(text) for text in texts)
    fitting = (end(i) for i in ids if i.size >= max(2, length))
    return list(itertools.islice(fitting, n_prompts))


def scored(
    llm: Llama, prompts: list[np.ndarray], cores: dict[Way, CoreConfig], n_continue: int
) -> Iterator[tuple[Way, np.ndarray, np.ndarray]]:
    """Per prompt and way: its name, dense ln p and its own, both (n_continue - 1, n_vocab)."""
    for ids in prompts:
        llm.core = "off"
        continuation = list(itertools.islice(llm.generate(ids, temp=0), n_continue))
        dense = llm.score(ids, continuation)[1:]
        for name, core in cores.items():
            llm.core = core
            yield name, dense, llm.score(ids, continuation)[1:]


def compare(
    llm: Llama, prompts: list[np.ndarray], cores: dict[Way, CoreConfig], n_continue: int
) -> dict[Way, np.ndarray]:
    """Per way of choosing neurons: (n_prompts, 2), KL to dense and agreement with dense."""
    found: dict[Way, list[tuple[float, float]]] = {name: [] for name in cores}
    for name, dense, got in scored(llm, prompts, cores, n_continue):
        same = (got.argmax(axis=1) == dense.argmax(axis=1)).mean()
        found[name].append((divergence(dense, got).mean(), same))
    return {name: np.array(rows) for name, rows in found.items()}


def summary(rows: np.ndarray) -> tuple[float, float, float]:
    """Mean KL, its standard error, and mean agreement of (n_prompts, 2)."""
    (kl, hits), n = rows.mean(axis=0), len(rows)
    return kl, rows[:, 0].std(ddof=1) / np.sqrt(n) if n > 1 else np.nan, hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("clusters")
    parser.add_argument("--data", required=True, help="texts as JSON lines")
    parser.add_argument("--fields", nargs="+", default=["question"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8, 16, 32, 64, 128])
    parser.add_argument("--blends", nargs="*", type=float, default=[0, 0.25, 0.5, 0.75])
    parser.add_argument("--share", type=float, default=0.4, help="of neurons that are kept")
    parser.add_argument("--prompts", type=int, default=16, help="of every length")
    parser.add_argument("--tokens", type=int, default=32, help="of every continuation")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the texts")
    parser.add_argument("--embedder", help="instead of the one that the clusters name")
    args = parser.parse_args()

    clusters = Clusters.load(args.clusters)
    cores = {
        "stable": CoreConfig(statistic=clusters.statistic, alpha=clusters.alpha, beta=args.share)
    }
    for blend in args.blends:
        name = f"similar, blend {blend:g}" if blend else "similar"
        cores[name] = CoreConfig(mode="similar", gamma=args.share, blend=blend)
    texts = read_texts(args.data, args.fields)
    np.random.default_rng(args.seed).shuffle(texts)
    with Llama(args.model, clusters=clusters, embedder=args.embedder, verbose=False) as llm:
        print(
            f"{Path(args.model).name}, {clusters.n_clusters} clusters by {clusters.by}, "
            f"{clusters.statistic}, {100 * args.share:g} % of neurons\n"
        )
        print("| prompt tokens | " + " | ".join(cores) + " |")
        print("| --- |" + " --- |" * len(cores))
        for length in args.lengths:
            prompts = cut_prompts(llm, texts, length, args.prompts)
            if not prompts:
                raise SystemExit(f"no text of {args.data} has {length} tokens")
            rows = compare(llm, prompts, cores, args.tokens)
            figures = [summary(r) for r in rows.values()]
            cells = [f"{kl:.3f} ± {error:.3f}, {hits:.2f}" for kl, error, hits in figures]
            print(f"| {length or 'all'} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
