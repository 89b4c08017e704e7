"""What it buys to begin an answer dense and to choose the neurons by its beginning, too (`start`).

In: a GGUF model, and texts as JSON lines, of which a prompt is the last n tokens, or one text
(.txt), which prompts are cut from. The continuation is the model's own, greedy or drawn. Out: a
Markdown table: KL to dense and agreement with dense of the tokens that follow the first N of it,
through the prompt's neurons alone (with a patch and without) and through those chosen after N
tokens; means over prompts with the standard error of the KL, and the last one's KL less that of the
prompt's neurons, prompt by prompt.

    python tools/measure_start.py MODEL.gguf --data FILE.jsonl --fields text --starts 32 64 \
        --betas 0.2 0.4 --temp 0.8
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np

from coreinfer import CoreConfig, Llama
from coreinfer.tuning import agreement, divergence
from measure_similarity import difference, read_prompts, summary

WAYS = ("no patch", "patch", "chosen after N")


def measure(
    llm: Llama,
    prompts: list[np.ndarray],
    starts: list[int],
    betas: list[float],
    n_tokens: int,
    temp: float,
) -> dict[tuple[int, float, str], np.ndarray]:
    """By start, share and way: (n_prompts, 2), KL to dense and agreement with dense."""
    found: dict[tuple[int, float, str], list[tuple[float, float]]] = {}
    for number, prompt in enumerate(prompts):
        llm.core = "off"
        ids = llm.generate(prompt, temp=temp, seed=number)
        text = list(itertools.islice(ids, max(starts) + n_tokens))
        dense = llm.score(prompt, text)
        for start, beta in itertools.product(starts, betas):
            for way in WAYS:
                # The first of these rows is dense in one way and not in the others.
                rows = slice(start + 1, start + n_tokens)
                chosen = start if way == WAYS[2] else 0
                llm.core = CoreConfig(beta=beta, patch=way != WAYS[0], start=chosen)
                got = llm.score(prompt, text[: start + n_tokens])[rows]
                figures = (divergence(dense[rows], got).mean(), agreement(dense[rows], got))
                found.setdefault((start, beta, way), []).append(figures)
    return {key: np.array(rows) for key, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="texts as JSON lines, or one .txt")
    parser.add_argument("--fields", nargs="+", default=["text"])
    parser.add_argument("--starts", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--betas", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48, help="of every continuation, after N")
    parser.add_argument("--temp", type=float, default=0.0, help="0: the likeliest token")
    args = parser.parse_args()
    if min(args.starts) < 1 or args.tokens < 2:
        raise SystemExit("--starts must be 1 or more, --tokens 2 or more")

    with Llama(args.model, verbose=False) as llm:
        prompts = read_prompts(llm, args.data, args.fields, args.length, args.prompts)
        found = measure(llm, prompts, args.starts, args.betas, args.tokens, args.temp)
    print(f"{Path(args.model).name}, {len(prompts)} prompts of {args.length} tokens\n")
    print("| KL, agreement | " + " | ".join(WAYS) + " | less the prompt's |")
    print("| --- |" + " --- |" * (len(WAYS) + 1))
    for start, beta in itertools.product(args.starts, args.betas):
        figures = [summary(found[start, beta, way]) for way in WAYS]
        cells = [f"{kl:.3f} ± {error:.3f}, {hits:.2f}" for kl, error, hits in figures]
        less, error = difference(found[start, beta, WAYS[2]], found[start, beta, WAYS[1]])
        cells.append(f"{less:+.3f} ± {error:.3f}")
        print(f"| N = {start}, β = {beta:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
