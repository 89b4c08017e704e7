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
from pathlib import Path

import numpy as np

from coreinfer import Clusters, CoreConfig, Llama
from measured_texts import add_activation, cell, compare, cut_prompts, difference, head, read_texts


def ways(clusters: Clusters, share: float, blends: list[float]) -> dict[str, CoreConfig]:
    """By column of the table: the prompt's neurons, then the cluster's with each blend."""
    cores = {"stable": CoreConfig(statistic=clusters.statistic, alpha=clusters.alpha, beta=share)}
    for blend in blends:
        blended = f", blend {blend:g}" if blend else ""
        cores[f"similar by {clusters.by}{blended}"] = CoreConfig(
            mode="similar", gamma=share, blend=blend
        )
    return cores


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
    add_activation(parser)
    args = parser.parse_args()

    files = [Clusters.load(path) for path in args.clusters]
    texts = read_texts(args.data, args.fields)
    np.random.default_rng(args.seed).shuffle(texts)
    with Llama(args.model, core="off", activation=args.activation, verbose=False) as llm:
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
                print("\n" + head(["prompt tokens", *rows]))
            print(f"| {length or 'all'} | " + " | ".join(map(cell, rows.values())) + " |")
            stable, *others = rows.values()
            less = [difference(other, stable) for other in others]
            print("| KL less that of stable | | " + " | ".join(less) + " |", flush=True)
        if cost:
            columns = ["prompt tokens", "clusters by", "prefill", "lookup, of it", "embedding"]
            print("\n" + head(columns))
            print("\n".join(cost))


if __name__ == "__main__":
    main()
