"""Whether `core="auto"` keeps its promise: KL to dense on texts that its tuning file has not seen.

In: a GGUF model with a tuning file beside it (`coreinfer tune`), and texts as JSON lines, of which
a prompt is the last n tokens, or one text (.txt), which prompts are cut from. The continuation is
the model's own greedy one, forced through what auto decides on. Out: a Markdown table by prompt
length and allowed KL: the mean KL over all prompts (those that it decodes exactly have none) with
its standard error, and how many prompts the core neurons answered.

    python tools/measure_auto.py MODEL.gguf --data FILE.jsonl --fields text --max-kl 0.05 0.1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from coreinfer import CoreConfig, Llama
from coreinfer.tuning import divergence, tuning_path
from measure_similarity import read_prompts, scored, summary


def measure(
    llm: Llama, prompts: list[np.ndarray], limits: list[float], n_continue: int
) -> dict[float, np.ndarray]:
    """Per allowed KL: (n_prompts, 2), KL to dense and whether core neurons decoded."""
    cores = {limit: CoreConfig(mode="auto", max_kl=limit) for limit in limits}
    found: dict[float, list[tuple[float, float]]] = {limit: [] for limit in limits}
    for limit, dense, got in scored(llm, prompts, cores, n_continue):
        by_core = llm.decision.config.mode in ("stable", "similar")
        found[limit].append((divergence(dense, got).mean(), by_core))
    return {limit: np.array(rows) for limit, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="texts as JSON lines, or one .txt")
    parser.add_argument("--fields", nargs="+", default=["text"])
    parser.add_argument("--max-kl", nargs="+", type=float, default=[0.05, 0.1, 0.2])
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--prompts", type=int, default=16, help="of every length")
    parser.add_argument("--tokens", type=int, default=48, help="of every continuation")
    parser.add_argument("--clusters", help="a clusters file that the model was tuned with")
    args = parser.parse_args()

    if not tuning_path(args.model).is_file():
        raise SystemExit(f"{tuning_path(args.model)} is not there; run `coreinfer tune` first")
    with Llama(args.model, clusters=args.clusters, verbose=False) as llm:
        print(f"{Path(args.model).name}\n")
        print("| prompt tokens | " + " | ".join(f"max_kl {k:g}" for k in args.max_kl) + " |")
        print("| --- |" + " --- |" * len(args.max_kl))
        for length in args.lengths:
            prompts = read_prompts(llm, args.data, args.fields, length, args.prompts)
            rows = measure(llm, prompts, args.max_kl, args.tokens)
            figures = [(*summary(r), len(r)) for r in rows.values()]
            cells = [f"{kl:.3f} ± {error:.3f}, {by * n:.0f} of {n}" for kl, error, by, n in figures]
            print(f"| {length} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
