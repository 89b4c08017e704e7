"""Whether `core="auto"` keeps its promise: KL to dense on texts that its tuning file has not seen.

In: a GGUF model with a tuning file beside it (`coreinfer tune`), and texts as JSON lines, of which
a prompt is the last n tokens, or one text (.txt), which prompts are cut from. The continuation is
the model's own, drawn or greedy, forced through what auto decides on. Out: a Markdown table by
prompt length and allowed KL: the mean KL over all prompts (those that it decodes exactly have none)
with its standard error, and how many prompts the core neurons answered. Where an answer begins
dense, the tokens after that are looked at. The last row is the speed over dense decoding that the
tuning file expects of an answer of 256 tokens where core neurons decode.

    python tools/measure_auto.py MODEL.gguf --data FILE.jsonl --fields text --max-kl 0.05 0.1
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coreinfer import CoreConfig, Llama
from coreinfer.tuning import EXPECTED_ANSWER, Tuning, divergence, gain, tuning_path
from measured_texts import head, mean_and_error, parser_of, read_prompts, scored


def measure(
    llm: Llama,
    prompts: list[np.ndarray],
    limits: list[float],
    n_tokens: int,
    temp: float = 0.0,
    most_dense: int = 0,
) -> dict[float, np.ndarray]:
    """Per allowed KL: (n_prompts, 2), KL to dense and whether core neurons decoded.

    `most_dense`: no answer begins with more dense tokens.
    """
    cores = {limit: CoreConfig(mode="auto", max_kl=limit) for limit in limits}
    found: dict[float, list[tuple[float, float]]] = {limit: [] for limit in limits}
    for limit, dense, got in scored(llm, prompts, cores, n_tokens + most_dense, temp):
        config = llm.decision.config
        by_core = config.mode in ("stable", "similar")
        first = config.start if by_core else 0
        rows = slice(first, first + n_tokens - 1)
        found[limit].append((divergence(dense[rows], got[rows]).mean(), by_core))
    return {limit: np.array(rows) for limit, rows in found.items()}


def speed(tuning: Tuning, limit: float, temp: float) -> str:
    """What is expected of the setting that is taken where a prompt is like those measured."""
    choice = tuning.choose(limit, temperature=temp)
    return "1.00" if choice is None else f"{gain(choice, EXPECTED_ANSWER):.2f}"


def main() -> None:
    parser = parser_of(__doc__, prompts=16, tokens=48)
    parser.add_argument("--max-kl", nargs="+", type=float, default=[0.05, 0.1, 0.2])
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--temp", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--tuning", help="instead of the tuning file beside the model")
    parser.add_argument("--clusters", help="a clusters file that the model was tuned with")
    args = parser.parse_args()

    path = Path(args.tuning or tuning_path(args.model))
    if not path.is_file():
        raise SystemExit(f"{path} is not there; run `coreinfer tune` first")
    tuning = Tuning.load(path)
    most_dense = max((row.config.start for row in tuning.rows), default=0)
    with Llama(
        args.model, clusters=args.clusters, tuning=tuning, activation=args.activation, verbose=False
    ) as llm:
        print(f"{Path(args.model).name}\n")
        print(head(["prompt tokens", *(f"max_kl {k:g}" for k in args.max_kl)]))
        for length in args.lengths:
            prompts = read_prompts(llm, args.data, args.fields, length, args.prompts)
            found = measure(llm, prompts, args.max_kl, args.tokens, args.temp, most_dense)
            cells = []
            for kl, by_core in (rows.T for rows in found.values()):
                mean, error = mean_and_error(kl)
                cells.append(f"{mean:.3f} ± {error:.3f}, {by_core.sum():.0f} of {kl.size}")
            print(f"| {length} | " + " | ".join(cells) + " |", flush=True)
        print("| speed | " + " | ".join(speed(tuning, k, args.temp) for k in args.max_kl) + " |")


if __name__ == "__main__":
    main()
