"""Whether exact mode writes dense decoding's text, and what it gains: both decode the same prompts.

In: a GGUF model and texts as JSON lines, of which a prompt is the last n tokens, or one text
(.txt), which prompts are cut from. Dense and exact decoding continue each in turn, greedily, read
anew. Out: one Markdown row: how many answers are the same ids, dense decoding's time over exact
mode's (over all prompts, of the median prompt, and the least of tenths of them), drafts that came
true, and tokens a verification.

    python tools/measure_exact.py MODEL.gguf --data FILE.jsonl --fields text --prompts 200

With --drafts N the core neurons alone draft, N tokens a verification whether that pays or not: what
their drafts are worth, and how well the set that drafts follows a long answer.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coreinfer import CoreConfig, Llama, _core
from coreinfer.timings import since
from measured_texts import head, parser_of, read_prompts

_PARTS = 10  # of the prompts, for the least speed: single answers are too short to time


@dataclass(frozen=True)
class Answer:
    """Ids, the seconds that decoding them took, and what exact mode did for them."""

    ids: list[int]
    seconds: float
    drafted: int = 0
    accepted: int = 0
    verifications: int = 0


def answer(
    llm: Llama, core: CoreConfig, prompt: np.ndarray, n_tokens: int, drafts: int | None = None
) -> Answer:
    """`n_tokens` greedy ids after a prompt that is read anew; exact with `drafts` of the core's."""
    if drafts and core.mode == "exact":
        return drafted(llm, core, prompt, n_tokens, drafts)
    llm.core = core
    llm.reset()
    ids = []
    for token in llm.generate(prompt, temp=0):
        ids.append(token)
        if len(ids) == n_tokens:
            break
    t = llm.timings
    return Answer(ids, t.decode_seconds, t.drafted_tokens, t.accepted_tokens, t.verifications)


def drafted(llm: Llama, core: CoreConfig, prompt: np.ndarray, n_tokens: int, drafts: int) -> Answer:
    """The same where the core neurons make that many drafts, always and alone."""
    session, greedy = llm._open_session(), _core.Sampler(temperature=0.0)
    llm.reset()
    before = session.timings
    session.prefill(prompt, statistic=core.statistic)
    session.set_exact(
        beta=core.beta, first_layer=core.first_layer, max_drafts=drafts, text=False, paced=False
    )
    ids = [session.sample(greedy)]
    while len(ids) < n_tokens:
        session.decode(ids[-1], greedy)
        ids.append(session.sample(greedy))
    session.end_exact()
    spent = since(session.timings, before)
    names = ("drafted_tokens", "accepted_tokens", "verifications")
    return Answer(ids, spent["decode_seconds"], *(spent[name] for name in names))


def measure(
    llm: Llama,
    exact: CoreConfig,
    prompts: list[np.ndarray],
    n_tokens: int,
    drafts: int | None = None,
) -> list[tuple[Answer, Answer]]:
    """(dense, exact) for each prompt; which comes first changes from prompt to prompt."""
    both = (CoreConfig.of("off"), exact)
    pairs = []
    for i, prompt in enumerate(prompts):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        found = {j: answer(llm, both[j], prompt, n_tokens, drafts) for j in order}
        pairs.append((found[0], found[1]))
    return pairs


def speed(pairs: list[tuple[Answer, Answer]]) -> float:
    """Exact mode's tokens a second over dense decoding's."""
    return sum(dense.seconds for dense, _ in pairs) / sum(exact.seconds for _, exact in pairs)


def table(pairs: list[tuple[Answer, Answer]]) -> str:
    same = sum(dense.ids == exact.ids for dense, exact in pairs)
    median = statistics.median(speed([pair]) for pair in pairs)
    parts = [pairs[i::_PARTS] for i in range(min(_PARTS, len(pairs)))]
    drafted, accepted, verifications = (
        sum(getattr(exact, name) for _, exact in pairs)
        for name in ("drafted", "accepted", "verifications")
    )
    came_true = f"{accepted} of {drafted}" if drafted else "none made"
    each = f"{1 + accepted / verifications:.2f}" if verifications else "–"
    columns = ["identical", "exact ÷ dense", "median prompt", "least of tenths"]
    columns += ["drafts that came true", "tokens a verification"]
    return (
        f"{head(columns)}\n| {same} of {len(pairs)} | {speed(pairs):.3f} | {median:.3f} | "
        f"{min(map(speed, parts)):.3f} | {came_true} | {each} |"
    )


def main() -> None:
    parser = parser_of(__doc__, prompts=200, tokens=32)
    parser.add_argument("--skip", type=int, default=0, help="prompts of JSON lines to leave out")
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--beta", type=float, default=CoreConfig.beta, help="of the core drafts")
    parser.add_argument("--drafts", type=int, metavar="N", help="of the core, always and alone")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    with Llama(
        args.model, core="off", n_threads=args.threads, activation=args.activation, verbose=False
    ) as llm:
        n = args.skip + args.prompts
        prompts = read_prompts(llm, args.data, args.fields, args.length, n)[args.skip :]
        if not prompts:
            raise SystemExit(f"--skip {args.skip} leaves no prompt of {args.data}")
        exact = CoreConfig(mode="exact", beta=args.beta)
        pairs = measure(llm, exact, prompts, args.tokens, args.drafts)
        print(f"{Path(args.model).name}, {llm.backend.n_threads} threads\n")
        print(table(pairs))
        if any(dense.ids != exact.ids for dense, exact in pairs):
            raise SystemExit("exact mode and dense decoding gave different ids")


if __name__ == "__main__":
    main()
