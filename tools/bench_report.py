"""Paired rounds become ratios with their spread, and a Markdown table of them.

Everything in a table compares runs of the same round: the machine's mood is in both.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_programs import Failure, Measurement

WEIGHT_BYTES = "weight_bytes_per_token"
KV_BYTES = "kv_bytes_per_token"


def step_bytes(row: Mapping[str, Any]) -> int:
    """Weights, keys and values that a decode step of a row reads; 0 where it is not known."""
    weights = row.get(WEIGHT_BYTES) or 0
    return weights and weights + (row.get(KV_BYTES) or 0)


@dataclass(frozen=True)
class Spread:
    """Least, median and greatest of one figure over the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None where there is no value."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(ordered[0], statistics.median(ordered), ordered[-1])

    def text(self, digits: int = 2) -> str:
        """ "1.21 (1.18–1.25)"."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


@dataclass(frozen=True)
class Line:
    """One line of the table: a test by one program, dense or with core neurons."""

    model: str
    test: str
    program: str
    core: str
    tok_s: Spread
    over_peer: dict[str, Spread]  # our tokens per second over each peer's, by its name
    over_best: Spread | None  # over the fastest peer of the round
    over_dense: Spread | None  # core rows: over our own dense
    of_byte_ratio: Spread | None  # that, over what the bytes saved allow
    row: dict[str, Any]  # of the round with the median speed (of two, the slower)

    @property
    def label(self) -> str:
        return f"{self.program} core {self.core}" if self.core else self.program


Key = tuple[str, str, str, str]  # model, test, program, core


def summarize(rounds: Sequence[Sequence[Measurement]], ours: str) -> list[Line]:
    """The lines of all rounds, peers first within a test.

    Parameters
    ----------
    rounds : what all programs measured in each round
    ours : the name of coreinfer-bench among them
    """
    tables: list[dict[Key, Measurement]] = [
        {(m.model, m.test, m.program, m.core): m for m in measured} for measured in rounds
    ]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    peers = list(dict.fromkeys(key[2] for key in keys if key[2] != ours))
    order = {name: i for i, name in enumerate(dict.fromkeys((k[0], k[1]) for k in keys))}
    keys.sort(key=lambda k: (order[k[0], k[1]], k[2] == ours))
    return [_line(key, tables, peers, ours) for key in keys]


def _line(
    key: Key, tables: Sequence[dict[Key, Measurement]], peers: Sequence[str], ours: str
) -> Line:
    model, test, program, core = key
    present = [table for table in tables if key in table]
    tok_s = Spread.of(table[key].tok_s for table in present)
    assert tok_s is not None
    by_speed = sorted((table[key] for table in present), key=lambda m: m.tok_s)
    middle = by_speed[(len(by_speed) - 1) // 2]

    def over(name: str) -> Spread | None:
        other = (model, test, name, "")
        return Spread.of(t[key].tok_s / t[other].tok_s for t in present if other in t)

    over_peer: dict[str, Spread] = {}
    best = over_dense = of_bytes = None
    if program == ours:
        over_peer = {peer: ratio for peer in peers if (ratio := over(peer))}
        best = Spread.of(
            t[key].tok_s / fastest for t in present if (fastest := _fastest(t, model, test, peers))
        )
    if core:
        over_dense = over(ours)
        of_bytes = Spread.of(
            _of_byte_ratio(t, key, ours) for t in present if _has_bytes(t, key, ours)
        )
    return Line(
        model,
        test,
        program,
        core,
        tok_s,
        over_peer,
        best,
        over_dense,
        of_bytes,
        middle.row,
    )


def _fastest(table: dict[Key, Measurement], model: str, test: str, peers: Sequence[str]) -> float:
    """Tokens per second of the fastest peer of a round; 0 where none has the test."""
    return max((m.tok_s for p in peers if (m := table.get((model, test, p, "")))), default=0.0)


def _has_bytes(table: dict[Key, Measurement], key: Key, ours: str) -> bool:
    dense = table.get((key[0], key[1], ours, ""))
    steps = table[key].row.get("n_prompt") == 0 and table[key].row.get("n_gen", 0) > 0
    return bool(steps and dense and step_bytes(dense.row) and step_bytes(table[key].row))


def _of_byte_ratio(table: dict[Key, Measurement], key: Key, ours: str) -> float:
    """Core over dense speed, as a share of dense over core bytes: 1 is all that can be had."""
    core, dense = table[key], table[key[0], key[1], ours, ""]
    return core.tok_s / dense.tok_s * step_bytes(core.row) / step_bytes(dense.row)


def markdown(lines: Sequence[Line], failures: Sequence[Failure], peers: Sequence[str]) -> str:
    """The table, and a list of what failed."""
    head = ["model", "test", "program", "tok/s", *(f"÷ {peer}" for peer in peers)]
    if len(peers) > 1:
        head.append("÷ best peer")
    head += ["÷ own dense", "of byte ratio", "MiB/token", "GB/s", "of bandwidth"]
    out = [
        "| " + " | ".join(head) + " |",
        "| " + " | ".join(["---"] * 3 + ["---:"] * (len(head) - 3)) + " |",
    ]
    for line in lines:
        cells = [Path(line.model).name, line.test, line.label, line.tok_s.text()]
        cells += [_text(line.over_peer.get(peer)) for peer in peers]
        if len(peers) > 1:
            cells.append(_text(line.over_best))
        cells += [_text(line.over_dense), _text(line.of_byte_ratio)]
        cells += [
            _number(step_bytes(line.row) or None, 1 / 2**20, 1),
            _number(line.row.get("eff_bw_gbs")),
            _number(line.row.get("read_bw_share")),
        ]
        out.append("| " + " | ".join(cells) + " |")
    out.append("\nMedian (least–greatest) of the rounds; ratios are taken within a round.")
    if failures:
        out += [
            "",
            "| failed | model | test | reason | rounds |",
            "| --- | --- | --- | --- | ---: |",
        ]
        for failure in dict.fromkeys(failures):
            reason = failure.reason.replace("|", "\\|")
            out.append(
                f"| {failure.program} | {Path(failure.model).name} | {failure.test} "
                f"| {reason} | {failures.count(failure)} |"
            )
    return "\n".join(out) + "\n"


def _text(spread: Spread | None) -> str:
    return spread.text() if spread else "–"


def _number(value: Any, scale: float = 1.0, digits: int = 2) -> str:
    return "–" if value is None else f"{float(value) * scale:.{digits}f}"
