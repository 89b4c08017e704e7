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

import itertools
from pathlib import Path

import numpy as np

from coreinfer import CoreConfig, Llama
from measured_texts import cell, compare, difference, head, parser_of, read_prompts

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
    cores = {
        (start, beta, way): CoreConfig(
            beta=beta, patch=way != WAYS[0], start=start if way == WAYS[2] else 0
        )
        for start, beta, way in itertools.product(starts, betas, WAYS)
    }

    def looked_at(key: tuple[int, float, str]) -> slice:
        start, *_ = key  # the row before these is dense in one way and not in the others
        return slice(start, start + n_tokens - 1)

    return compare(llm, prompts, cores, max(starts) + n_tokens, temp, looked_at)


def main() -> None:
    parser = parser_of(__doc__, prompts=12, tokens=48)
    parser.add_argument("--starts", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--betas", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--temp", type=float, default=0.0, help="0: the likeliest token")
    args = parser.parse_args()
    if min(args.starts) < 1 or args.tokens < 2:
        raise SystemExit("--starts must be 1 or more, --tokens 2 or more")

    with Llama(args.model, activation=args.activation, verbose=False) as llm:
        prompts = read_prompts(llm, args.data, args.fields, args.length, args.prompts)
        found = measure(llm, prompts, args.starts, args.betas, args.tokens, args.temp)
    print(f"{Path(args.model).name}, {len(prompts)} prompts of {args.length} tokens\n")
    print(head(["KL, agreement", *WAYS, "less the prompt's"]))
    for start, beta in itertools.product(args.starts, args.betas):
        none, patched, after = (found[start, beta, way] for way in WAYS)
        cells = [cell(none), cell(patched), cell(after), difference(after, patched)]
        print(f"| N = {start}, β = {beta:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
