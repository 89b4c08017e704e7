"""What the patch takes away of the divergence, and what a prior of other texts adds to it.

In: a GGUF model, and texts as JSON lines, of which a prompt is the last n tokens, or one text
(.txt), which prompts are cut from; for the prior, clusters that `coreinfer cluster build` made with
it from other texts. The continuation is the model's own greedy one. Out: a Markdown table of KL to
dense and agreement with dense by share of neurons, means over prompts with the standard error of
the KL, then how many times as far the smallest share with a patch is from dense as the largest
without.

    python tools/measure_patch.py MODEL.gguf --data FILE.jsonl --fields text \
        --clusters CLUSTERS.npz --betas 0.2 0.4 --length 256
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coreinfer import Clusters, CoreConfig, Llama
from measured_texts import cell, compare, head, parser_of, read_prompts


def ways(betas: list[float], rank: int, prior: bool) -> dict[tuple[float, str], CoreConfig]:
    """By share of neurons and column of the table."""
    columns = {"no patch": {"patch": False}, "patch": {"patch": rank, "prior": False}}
    if prior:
        columns["patch, prior"] = {"patch": rank, "prior": True}
    return {
        (beta, name): CoreConfig(mode="stable", beta=beta, **options)
        for beta in betas
        for name, options in columns.items()
    }


def main() -> None:
    parser = parser_of(__doc__, prompts=12, tokens=48)
    parser.add_argument("--clusters", help="the file whose prior is tried, too")
    parser.add_argument("--betas", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--patch", type=int, default=64, help="its rank")
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt")
    args = parser.parse_args()

    clusters = None if args.clusters is None else Clusters.load(args.clusters)
    if clusters is not None and clusters.prior is None:
        raise SystemExit(f"{args.clusters} holds no prior; build it with --patch-rows 128")
    cores = ways(sorted(args.betas), args.patch, clusters is not None)
    with Llama(args.model, clusters=clusters, activation=args.activation, verbose=False) as llm:
        prompts = read_prompts(llm, args.data, args.fields, args.length, args.prompts)
        found = compare(llm, prompts, cores, args.tokens)
    columns = list(dict.fromkeys(name for _, name in cores))
    print(f"{Path(args.model).name}, {len(prompts)} prompts of {args.length} tokens\n")
    print(head(["KL, agreement", *columns]))
    for beta in dict.fromkeys(beta for beta, _ in cores):
        cells = [cell(found[beta, name]) for name in columns]
        print(f"| β = {beta:g} | " + " | ".join(cells) + " |")
    betas = sorted(args.betas)
    far = np.mean(found[betas[-1], "no patch"][:, 0])
    for name in columns[1:]:
        times = np.mean(found[betas[0], name][:, 0]) / far
        print(f"\nβ = {betas[0]:g} with {name}, over β = {betas[-1]:g} with none: {times:.2f}")


if __name__ == "__main__":
    main()
