"""What reading generated tokens again buys: KL to dense by position, for several values of refresh.

In: a GGUF model and a text. Pieces of the text are cut into a prompt and a continuation, which is
forced through the core neurons. A refresh after k tokens is a prefill of the prompt and of those k,
so that is how it is measured: the next tokens are scored with the set that such a prefill chooses.
With clusters the neurons are those of the prompt's cluster, and the text's own scores weigh as much
beside them as k is of the whole text, as in a generation. Out: a Markdown table, means over pieces
with the standard error; "none" keeps the prompt's set.

    python tools/measure_refresh.py MODEL.gguf --text FILE.txt --ends 256 1024 4096 \
        --refresh 64 256 [--clusters CLUSTERS.npz]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from coreinfer import Clusters, CoreConfig, Llama
from coreinfer.tuning import divergence
from measured_texts import add_activation, cut_text, head, mean_and_error

BLOCK = 256  # tokens that dense decoding scores at once


def forced(llm: Llama, prompt: np.ndarray, text: np.ndarray, refresh: int | None) -> np.ndarray:
    """float32 (n, n_vocab): ln p of each next token, the set chosen anew every `refresh` tokens."""
    core, step, rows = llm.core, refresh or text.size, []
    for k in range(0, text.size, step):
        if core.mode == "similar":
            llm.core = replace(core, blend=max(core.blend, k / (prompt.size + k)))
        rows.append(llm.score(np.concatenate([prompt, text[:k]]), text[k : k + step]))
    llm.core = core
    return np.concatenate(rows)


def cluster_of(llm: Llama, prompt: np.ndarray, clusters: Clusters) -> Clusters:
    """The prompt's cluster alone: as a text grows it stays the same."""
    llm.set_clusters(clusters)
    llm.score(prompt, [])
    one = slice(llm.core_set.cluster, llm.core_set.cluster + 1)
    return replace(
        clusters,
        centroids=clusters.centroids[one],
        scores=[layer[one] for layer in clusters.scores],
        n_texts=clusters.n_texts[one],
    )


def compare(
    llm: Llama,
    pieces: list[np.ndarray],
    n_prompt: int,
    core: CoreConfig,
    refreshes: list[int | None],
) -> dict[int | None, np.ndarray]:
    """Per refresh: KL to dense, float64 (n_pieces, n_tokens)."""
    found: dict[int | None, list[np.ndarray]] = {r: [] for r in refreshes}
    clusters = llm.clusters
    for piece in pieces:
        prompt, text = piece[:n_prompt], piece[n_prompt:]
        llm.core = "off"
        dense = forced(llm, prompt, text, BLOCK)
        llm.core = core
        if core.mode == "similar":
            llm.set_clusters(cluster_of(llm, prompt, clusters))
        for refresh in refreshes:
            found[refresh].append(divergence(dense, forced(llm, prompt, text, refresh)))
    if core.mode == "similar":
        llm.set_clusters(clusters)
    return {refresh: np.array(rows) for refresh, rows in found.items()}


def windows(ends: list[int]) -> list[tuple[int, int]]:
    """[first, last) token of each row of the table."""
    return list(zip([0, *ends[:-1]], ends, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="a UTF-8 text")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--ends", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--refresh", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--pieces", type=int, default=4, help="of the text")
    parser.add_argument("--beta", type=float, default=0.4, help="share of neurons that are kept")
    parser.add_argument("--statistic", default="flock")
    parser.add_argument("--patch", type=int, default=64, help="its rank; 0 is none")
    parser.add_argument("--clusters", help="a file of clusters, whose neurons decode (similar)")
    add_activation(parser)
    args = parser.parse_args()
    if sorted(set(args.ends)) != args.ends or min(args.ends + args.refresh) < 1:
        raise SystemExit("--ends must rise from 1 on, --refresh must be 1 or more")

    n_ctx = args.prompt + args.ends[-1]
    core = CoreConfig(statistic=args.statistic, beta=args.beta, patch=args.patch or False)
    if args.clusters is not None:
        core = CoreConfig(mode="similar", gamma=args.beta, patch=args.patch or False)
    refreshes: list[int | None] = [None, *args.refresh]
    with Llama(
        args.model, n_ctx=n_ctx, clusters=args.clusters, activation=args.activation, verbose=False
    ) as llm:
        pieces = cut_text(llm, args.text, n_ctx, args.pieces)
        found = compare(llm, pieces, args.prompt, core, refreshes)
        statistic = args.statistic
        if llm.clusters is not None:
            statistic = f"{llm.clusters.n_clusters} clusters by {llm.clusters.by}"
    print(f"{Path(args.model).name}, {statistic}, beta {args.beta:g}, patch {args.patch},")
    print(f"prompts of {args.prompt} tokens, {len(pieces)} pieces\n")
    print(head(["tokens", *(f"refresh {r or 'none'}" for r in refreshes)]))
    for first, last in windows(args.ends):
        cells = []
        for kl in found.values():
            mean, error = mean_and_error(kl[:, first:last].mean(axis=1))
            cells.append(f"{mean:.3f} ± {error:.3f}")
        print(f"| {first + 1}–{last} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
