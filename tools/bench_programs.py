"""Runs a llama-bench or a coreinfer-bench once and reads its rows, whatever it does.

A peer that crashes, hangs or writes half a file is a result like any other: the rows it finished
are kept and the tests it did not are failures with the reason.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Program:
    """A benchmark binary; `ours` is coreinfer-bench, which knows core neurons.

    `arguments` stand before all others. `takes_depth` is false for programs like ik_llama.cpp's,
    which have no `-d` and generate after a prompt with `-gp` instead.
    """

    name: str
    path: Path
    ours: bool = False
    arguments: tuple[str, ...] = ()
    takes_depth: bool = True


@dataclass(frozen=True)
class Settings:
    """What every program measures. Depths are tokens already in the context.

    `core` are coreinfer-bench's own flags; with them, generation follows a prefill of `n_prompt`
    tokens, so that peers generate at that depth, too.
    """

    n_prompt: Sequence[int] = (512,)
    n_gen: Sequence[int] = (64,)
    depth: int = 0
    n_threads: int = 2
    repetitions: int = 2
    core: Sequence[str] = ()
    bandwidth: str = "4"  # GiB that coreinfer-bench reads to measure it
    timeout: float = 1800.0  # seconds, of one invocation

    def gen_depths(self) -> list[int]:
        """Depths of the generation tests: after each prompt where core neurons need one."""
        if not self.core:
            return [self.depth]
        return sorted({self.depth + n for n in self.n_prompt})


@dataclass(frozen=True)
class Measurement:
    """One row: tokens per second of a test, and all that the program said about it."""

    program: str
    model: str
    test: str  # "pp512", "tg64 @ d512"
    core: str  # "" for dense, else what decoded: "flock 0.4"
    tok_s: float  # mean over the repetitions
    row: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Failure:
    """A test that gave no row."""

    program: str
    model: str
    test: str
    reason: str


def name_of_test(n_prompt: int, n_gen: int, depth: int) -> str:
    """llama-bench's name of a test."""
    name = f"pp{n_prompt}" if n_gen == 0 else f"tg{n_gen}"
    if n_prompt and n_gen:
        name = f"pp{n_prompt}+tg{n_gen}"
    return f"{name} @ d{depth}" if depth else name


def invocations(
    program: Program, model: str, settings: Settings
) -> list[tuple[list[str], list[str]]]:
    """Command lines that cover all tests of a program, each with the tests it must give."""
    base = [
        str(program.path),
        *program.arguments,
        "-m",
        model,
        "-t",
        str(settings.n_threads),
        "-r",
        str(settings.repetitions),
        "-o",
        "json",
    ]
    prompts, gens = _list(settings.n_prompt), _list(settings.n_gen)
    pp = [name_of_test(p, 0, settings.depth) for p in settings.n_prompt]
    tg = [name_of_test(0, n, d) for d in settings.gen_depths() for n in settings.n_gen]
    if program.ours:
        own = ["-d", str(settings.depth), "--bandwidth", settings.bandwidth, *settings.core]
        return [([*base, "-p", prompts, "-n", gens, *own], pp + tg)]
    commands = [([*base, "-p", prompts, "-n", "0", *_depth([settings.depth])], pp)]
    depths = settings.gen_depths()
    if program.takes_depth or depths == [0]:
        commands.append(([*base, "-p", "0", "-n", gens, *_depth(depths)], tg))
    else:
        after = [arg for d in depths for n in settings.n_gen for arg in ("-gp", f"{d},{n}")]
        commands.append(([*base, "-p", "0", "-n", "0", *after], tg))
    return commands


def takes_depth(path: Path) -> bool:
    """Whether a program's help has no `-gp`, which stands for `-d` where there is none."""
    try:
        done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return True  # running it will say what is wrong
    return " -gp " not in done.stdout


def _list(values: Sequence[int]) -> str:
    return ",".join(str(v) for v in values)


def _depth(depths: Sequence[int]) -> list[str]:
    # Programs without the flag still do what needs none.
    return [] if list(depths) == [0] else ["-d", _list(depths)]


def parse_rows(text: str) -> list[dict[str, Any]]:
    """The whole objects of a JSON list, also when the list breaks off."""
    decoder = json.JSONDecoder()
    rows: list[dict[str, Any]] = []
    at = text.find("[") + 1
    while (at := _next_object(text, at)) >= 0:
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        rows.append(row)
    return rows


def _next_object(text: str, at: int) -> int:
    """Where the next member of the list starts, or -1 at its end."""
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at if at < len(text) and text[at] == "{" else -1


def exit_reason(code: int, stderr: str) -> str:
    """Why a process failed, in a few words: its signal or status, and the last it said."""
    if code < 0:
        try:
            reason = f"killed by {signal.Signals(-code).name}"
        except ValueError:
            reason = f"killed by signal {-code}"
    else:
        reason = f"exit status {code}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return f"{reason}: {lines[-1][:200]}" if lines else reason


def run_program(
    program: Program, model: str, settings: Settings
) -> tuple[list[Measurement], list[Failure]]:
    """Every test of `settings` on `model` once, in as few processes as it takes.

    Returns
    -------
    Measurements in the order of the rows, and a failure for each test without one. Never raises
    for what a program does.
    """
    measured: list[Measurement] = []
    failures: list[Failure] = []
    for command, tests in invocations(program, model, settings):
        rows, reason = _run(command, settings.timeout)
        found = [m for m in map(lambda r: _measurement(program, model, r), rows) if m]
        measured += found
        names = {m.test for m in found if not m.core}
        failures += [
            Failure(program.name, model, test, reason or "no row for this test")
            for test in tests
            if test not in names
        ]
        # Core rows come after their dense row, so a failure may leave only them out.
        if reason and names >= set(tests):
            failures.append(Failure(program.name, model, "later rows", reason))
    return measured, failures


def _run(command: list[str], timeout: float) -> tuple[list[dict[str, Any]], str]:
    """Rows of a command, and why there may be too few ("" when it ended well)."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        text = out if isinstance(out, str) else out.decode(errors="replace")
        return parse_rows(text), f"no end after {timeout:g} s"
    except OSError as error:
        return [], f"cannot be started: {error.strerror or error}"
    rows = parse_rows(done.stdout)
    if done.returncode != 0:
        return rows, exit_reason(done.returncode, done.stderr)
    return rows, "" if rows else "it wrote no JSON rows"


def _measurement(program: Program, model: str, row: dict[str, Any]) -> Measurement | None:
    """A row with a positive speed; None for one that is not llama-bench's."""
    try:
        tok_s = float(row["avg_ts"])
        n_prompt, n_gen, depth = (int(row.get(k) or 0) for k in ("n_prompt", "n_gen", "n_depth"))
        name = row.get("test") or name_of_test(n_prompt, n_gen, depth)
        if not program.takes_depth:
            name = name_of_test(0, n_gen, n_prompt) if "@pp" in name else name
    except (KeyError, TypeError, ValueError):
        return None
    if tok_s <= 0.0:
        return None
    core = ""
    if row.get("core", "off") != "off":
        core = str(row.get("model_type")).rpartition(" core ")[2]  # "flock 0.4", "count(0.4) 0.2"
    return Measurement(program.name, model, name, core, tok_s, row)
