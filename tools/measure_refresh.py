"""What reading generated tokens again buys: KL to dense by position, for several values of refresh.

In: a GGUF model and a text. Pieces of the text are cut into a prompt and a continuation, which is
forced through the core neurons. A refresh after k tokens is a prefill of the prompt and of those k,
so that is how it is measured: the next tokens are scored with the set that such a prefill chooses.
Out: a Markdown table, means over pieces with the standard error; "none" keeps the prompt's set.

    python tools/measure_refresh.py MODEL.gguf --text FILE.txt --ends 256 1024 4096 --refresh 64 256
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from coreinfer import CoreConfig, Llama
from coreinfer.tuning import cut, divergence

BLOCK = 256  # tokens that dense decoding scores at once


def forced(llm: Llama, prompt: np.ndarray, text: np.ndarray, refresh: int | None) -> np.ndarray:
    """float32 (n, n_vocab): ln p of each next token, the set chosen anew every `refresh` tokens."""
    step = refresh or text.size
    rows = [
        llm.score(np.concatenate([prompt, text[:k]]), text[k : k + step])
        for k in range(0, text.size, step)
    ]
    return np.concatenate(rows)


def compare(
    llm: Llama,
    pieces: list[np.ndarray],
    n_prompt: int,
    core: CoreConfig,
    refreshes: list[int | None],
) -> dict[int | None, np.ndarray]:
    """Per refresh: KL to dense, float64 (n_pieces, n_tokens)."""
    found: dict[int | None, list[np.ndarray]] = {r: [] for r in refreshes}
    for piece in pieces:
        prompt, text = piece[:n_prompt], piece[n_prompt:]
        llm.core = "off"
        dense = forced(llm, prompt, text, BLOCK)
        llm.core = core
        for refresh in refreshes:
            found[refresh].append(divergence(dense, forced(llm, prompt, text, refresh)))
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
    args = parser.parse_args()
    if sorted(set(args.ends)) != args.ends or min(args.ends + args.refresh) < 1:
        raise SystemExit("--ends must rise from 1 on, --refresh must be 1 or more")

    n_ctx = args.prompt + args.ends[-1]
    core = CoreConfig(statistic=args.statistic, beta=args.beta, patch=args.patch or False)
    refreshes: list[int | None] = [None, *args.refresh]
    with Llama(args.model, n_ctx=n_ctx, verbose=False) as llm:
        text = Path(args.text).read_bytes()
        ids = llm.checked_ids(llm.tokenize(text, add_bos=False, special=False))
        bos = llm.tokenizer().bos_id if llm.tokenizer().add_bos else None
        pieces = cut(ids, n_ctx, args.pieces, bos=bos)
        found = compare(llm, pieces, args.prompt, core, refreshes)
    print(f"{Path(args.model).name}, {args.statistic}, beta {args.beta:g}, patch {args.patch},")
    print(f"prompts of {args.prompt} tokens, {len(pieces)} pieces\n")
    print("| tokens | " + " | ".join(f"refresh {r or 'none'}" for r in refreshes) + " |")
    print("| --- |" + " --- |" * len(refreshes))
    for first, last in windows(args.ends):
        cells = []
        for kl in found.values():
            means = kl[:, first:last].mean(axis=1)
            error = means.std(ddof=1) / np.sqrt(means.size) if means.size > 1 else np.nan
            cells.append(f"{means.mean():.3f} ± {error:.3f}")
        print(f"| {first + 1}–{last} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
