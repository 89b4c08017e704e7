"""How close similarity-guided decoding stays to dense, beside stability-guided, by prompt length.

In: a GGUF model, one file of clusters or several that `coreinfer cluster build` made with it, and
texts as JSON lines that the clusters have not seen. A prompt is the last n tokens of a text (0: all
of it), BOS first where the tokenizer adds one; the continuation is the model's own greedy one. Out:
a Markdown table of KL to dense and agreement with dense, means over prompts with the standard error
of the KL; the same of the KL's difference to stability-guided decoding, prompt by prompt, which is
far more certain than either; and what looking a cluster up takes. The first position comes from the
dense prefill and is left out. BLEND is the weight of the prompt's own neurons: 0 is the cluster
alone. Stability-guided decoding learns its patch from the first file's prior, too.

    python tools/measure_similarity.py MODEL.gguf CLUSTERS.npz [CLUSTERS.npz] --data FILE.jsonl \
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
from coreinfer.tuning import agreement, cut, divergence

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


def cut_text(llm: Llama, path: str, length: int, n_prompts: int) -> list[np.ndarray]:
    """Prompts of `length` ids spread evenly over a text, as `coreinfer tune` cuts its own."""
    ids = llm.checked_ids(llm.tokenize(Path(path).read_bytes(), add_bos=False, special=False))
    tokenizer = llm.tokenizer()
    return cut(ids, length, n_prompts, bos=tokenizer.bos_id if tokenizer.add_bos else None)


def read_prompts(
    llm: Llama, path: str, fields: list[str], length: int, n_prompts: int
) -> list[np.ndarray]:
    """By `cut_text` of a .txt file, else by `cut_prompts` of JSON lines; SystemExit for none."""
    if Path(path).suffix == ".txt":
        return cut_text(llm, path, length, n_prompts)
    prompts = cut_prompts(llm, read_texts(path, fields), length, n_prompts)
    if not prompts:
        raise SystemExit(f"no text of {path} has {length} tokens")
    return prompts


def scored(
    llm: Llama,
    prompts: list[np.ndarray],
    cores: dict[Way, CoreConfig],
    n_continue: int,
    temp: float = 0.0,
) -> Iterator[tuple[Way, np.ndarray, np.ndarray]]:
    """Per prompt and way: its name, dense ln p and its own, both (n_continue - 1, n_vocab)."""
    for number, ids in enumerate(prompts):
        llm.core = "off"
        drawn = llm.generate(ids, temp=temp, seed=number)
        continuation = list(itertools.islice(drawn, n_continue))
        dense = llm.score(ids, continuation)[1:]
        for name, core in cores.items():
            llm.core = core
            yield name, dense, llm.score(ids, continuation, temperature=temp)[1:]


def compare(
    llm: Llama, prompts: list[np.ndarray], cores: dict[Way, CoreConfig], n_continue: int
) -> dict[Way, np.ndarray]:
    """Per way of choosing neurons: (n_prompts, 2), KL to dense and agreement with dense."""
    found: dict[Way, list[tuple[float, float]]] = {name: [] for name in cores}
    for name, dense, got in scored(llm, prompts, cores, n_continue):
        found[name].append((divergence(dense, got).mean(), agreement(dense, got)))
    return {name: np.array(rows) for name, rows in found.items()}


def summary(rows: np.ndarray) -> tuple[float, float, float]:
    """Mean KL, its standard error, and mean agreement of (n_prompts, 2)."""
    (kl, hits), n = rows.mean(axis=0), len(rows)
    return kl, rows[:, 0].std(ddof=1) / np.sqrt(n) if n > 1 else np.nan, hits


def ways(clusters: Clusters, share: float, blends: list[float]) -> dict[str, CoreConfig]:
    """By column of the table: the prompt's neurons, then the cluster's with each blend."""
    cores = {"stable": CoreConfig(statistic=clusters.statistic, alpha=clusters.alpha, beta=share)}
    for blend in blends:
        blended = f", blend {blend:g}" if blend else ""
        cores[f"similar by {clusters.by}{blended}"] = CoreConfig(
            mode="similar", gamma=share, blend=blend
        )
    return cores


def difference(rows: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean of the KL of `rows` less that of `other`, prompt by prompt, and its standard error."""
    kl, error, _ = summary(rows - other)
    return kl, error


def lookup_cost(llm: Llama, prompts: list[np.ndarray]) -> tuple[float, float, float]:
    """Median seconds, with the present setting: of a prefill, of the lookup and of embedding."""
    seconds = []
    for ids in prompts:
        llm.reset()
        llm.score(ids, [])
        t = llm.timings
        seconds.append((t.prefill_seconds, t.lookup_seconds, t.embed_seconds))
    return tuple(np.median(seconds, axis=0).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("clusters", nargs="+")
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

    files = [Clusters.load(path) for path in args.clusters]
    texts = read_texts(args.data, args.fields)
    np.random.default_rng(args.seed).shuffle(texts)
    with Llama(args.model, core="off", verbose=False) as llm:
        print(f"{Path(args.model).name}, {100 * args.share:g} % of neurons")
        for c in files:
            print(f"{c.n_clusters} clusters by {c.by}, {c.statistic}")
        cost = []
        for i, length in enumerate(args.lengths):
            prompts = cut_prompts(llm, texts, length, args.prompts)
            if not prompts:
                raise SystemExit(f"no text of {args.data} has {length} tokens")
            rows: dict[str, np.ndarray] = {}
            for c in files:
                llm.core = "off"
                llm.set_clusters(c, args.embedder if c.by == "embedding" else None)
                cores = ways(c, args.share, args.blends)
                if rows:
                    del cores["stable"]
                rows |= compare(llm, prompts, cores, args.tokens)
                if args.blends:
                    prefill, lookup, embed = lookup_cost(llm, prompts)
                    cost.append(
                        f"| {length or 'all'} | {c.by} | {1e3 * prefill:.1f} ms | "
                        f"{100 * lookup / prefill:.2f} % | {1e3 * embed:.1f} ms |"
                    )
            if i == 0:
                print("\n| prompt tokens | " + " | ".join(rows) + " |")
                print("| --- |" + " --- |" * len(rows))
            figures = [(*summary(r), *difference(r, rows["stable"])) for r in rows.values()]
            cells = [f"{kl:.3f} ± {e:.3f}, {hits:.2f}" for kl, e, hits, *_ in figures]
            print(f"| {length or 'all'} | " + " | ".join(cells) + " |")
            less = [f"{kl:+.3f} ± {e:.3f}" for *_, kl, e in figures[1:]]
            print("| KL less that of stable | | " + " | ".join(less) + " |", flush=True)
        if cost:
            print("\n| prompt tokens | clusters by | prefill | lookup, of it | embedding |")
            print("| --- | --- | --- | --- | --- |")
            print("\n".join(cost))


if __name__ == "__main__":
    main()
