"""What the measure_*.py tools share: prompts, own answers decoded in several ways, their tables.

In: a model, and texts as JSON lines, of which a prompt is the last n tokens, or one text (.txt),
which prompts are cut from. Out: ln p of dense decoding and of each way at every position of the
model's own answer, and cells of Markdown tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from coreinfer import CoreConfig, Llama
from coreinfer.tuning import agreement, cut, divergence

Way = TypeVar("Way", bound=Hashable)


def add_activation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activation", metavar="NAME", help="where the file has lost it, as `coreinfer run`"
    )


def parser_of(description: str, *, prompts: int, tokens: int) -> argparse.ArgumentParser:
    """The flags of a tool that reads prompts by `read_prompts`; these many by default."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="texts as JSON lines, or one .txt")
    parser.add_argument("--fields", nargs="+", default=["text"])
    parser.add_argument("--prompts", type=int, default=prompts, help="of every length")
    parser.add_argument("--tokens", type=int, default=tokens, help="of every continuation")
    add_activation(parser)
    return parser


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
    llm: Llama,
    prompts: list[np.ndarray],
    cores: dict[Way, CoreConfig],
    n_continue: int,
    temp: float = 0.0,
    looked_at: Callable[[Way], slice] = lambda way: slice(None),
) -> dict[Way, np.ndarray]:
    """Per way: (n_prompts, 2), KL to dense and agreement with dense over the rows `looked_at`."""
    found: dict[Way, list[tuple[float, float]]] = {name: [] for name in cores}
    for name, *both in scored(llm, prompts, cores, n_continue, temp):
        dense, got = (rows[looked_at(name)] for rows in both)
        found[name].append((divergence(dense, got).mean(), agreement(dense, got)))
    return {name: np.array(rows) for name, rows in found.items()}


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of (n,), and its standard error, NaN for one."""
    n = values.size
    return values.mean(), values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan


def cell(rows: np.ndarray) -> str:
    """Mean KL, its standard error, and mean agreement of (n_prompts, 2)."""
    kl, error = mean_and_error(rows[:, 0])
    return f"{kl:.3f} ± {error:.3f}, {rows[:, 1].mean():.2f}"


def difference(rows: np.ndarray, other: np.ndarray) -> str:
    """Mean of the KL of `rows` less that of `other`, prompt by prompt, and its standard error."""
    kl, error = mean_and_error(rows[:, 0] - other[:, 0])
    return f"{kl:+.3f} ± {error:.3f}"


def head(columns: Iterable[str]) -> str:
    """The first two lines of a Markdown table."""
    columns = list(columns)
    return "| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|"
