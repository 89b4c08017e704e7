"""Compares coreinfer-bench with llama-bench binaries on the same files and threads.

The programs run in turn, round after round, and ratios are taken within a round. For example:
`python tools/compare_llama_cpp.py -m M.gguf --peer llama.cpp=build/bin/llama-bench --beta 0.2,0.4
--out results` prints a table of ratios and writes comparison.md, comparison.json and roofline.png
there. A peer that crashes is reported with the reason, and the others go on. ik_llama.cpp's
llama-bench is one, too.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench_programs import Failure, Measurement, Program, Settings, run_program, takes_depth
from bench_report import markdown, summarize
from bench_roofline import plot

OURS = "coreinfer"


def numbers(text: str) -> list[int]:
    """Comma-separated whole numbers of at least 1, for argparse."""
    values = [int(member) for member in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
    return values


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    return numbers(text)[0]


def seconds(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("-m", "--model", action="append", required=True, help="GGUF file; repeatable")
    p.add_argument(
        "--peer",
        action="append",
        metavar="NAME=PATH [ARGUMENT…]",
        help="a llama-bench binary, and arguments of its own after the path; repeatable "
        "(default: llama-bench on PATH)",
    )
    p.add_argument(
        "--bench",
        type=Path,
        metavar="PATH",
        help="coreinfer-bench (default: the one of the installed package)",
    )
    p.add_argument("-p", "--n-prompt", type=numbers, default=[512], metavar="N,…")
    p.add_argument("-n", "--n-gen", type=numbers, default=[64], metavar="N,…")
    p.add_argument(
        "-d",
        "--n-depth",
        type=int,
        default=0,
        metavar="N",
        help="tokens in the context before the prompt",
    )
    p.add_argument("-t", "--threads", type=count, default=default_threads())
    p.add_argument(
        "-r",
        "--repetitions",
        type=count,
        default=2,
        help="of each test within a round (default: 2)",
    )
    p.add_argument("--rounds", type=count, default=3, help="(default: 3)")
    p.add_argument("--beta", help="shares of neurons to keep, for core rows beside the dense ones")
    p.add_argument("--statistic", help="of the core rows, as coreinfer-bench takes it")
    p.add_argument("--alpha", help="of the core rows")
    p.add_argument("--layers", help="of the core rows, FIRST:LAST")
    p.add_argument(
        "--bandwidth",
        default="4",
        metavar="GIB",
        help="memory that coreinfer-bench reads to measure bandwidth; 0 skips",
    )
    p.add_argument("--timeout", type=seconds, default=1800.0, help="seconds for one process")
    p.add_argument("--out", type=Path, default=Path("comparison"), metavar="DIRECTORY")
    p.add_argument("--no-plot", action="store_true", help="do not draw roofline.png")
    return p


def default_threads() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_programs(args: argparse.Namespace) -> list[Program]:
    """Peers and coreinfer-bench. ValueError for a name that is unusable or a missing binary."""
    programs = []
    for peer in args.peer or []:
        name, equals, path = peer.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--peer {peer!r} is not NAME=PATH")
        if name == OURS or name in {p.name for p in programs}:
            raise ValueError(f"--peer {peer!r}: the name {name!r} is taken")
        try:
            binary, *arguments = [path] if Path(path).exists() else shlex.split(path)
        except ValueError as error:
            raise ValueError(f"--peer {peer!r}: {error}") from None
        programs.append(
            Program(
                name,
                Path(binary),
                arguments=tuple(arguments),
                takes_depth=takes_depth(Path(binary)),
            )
        )
    if not programs:
        found = shutil.which("llama-bench")
        if not found:
            raise ValueError("no llama-bench on PATH: name one with --peer NAME=PATH")
        programs.append(Program("llama.cpp", Path(found)))
    bench = args.bench
    if bench is None:
        from coreinfer.bench import binary_path

        bench = binary_path()
    return [*programs, Program(OURS, bench, ours=True)]


def core_flags(args: argparse.Namespace) -> list[str]:
    """coreinfer-bench's flags for core rows; none when no share to keep was given."""
    given = {"--statistic": args.statistic, "--alpha": args.alpha, "--layers": args.layers}
    if args.beta is None:
        extra = [flag for flag, value in given.items() if value is not None]
        if extra:
            raise ValueError(f"{extra[0]} is for core rows: give --beta, too")
        return []
    flags = ["--core", "off,stable", "--beta", args.beta]
    for flag, value in given.items():
        if value is not None:
            flags += [flag, value]
    return flags


def run_rounds(
    programs: Sequence[Program], models: Sequence[str], settings: Settings, n_rounds: int
) -> tuple[list[list[Measurement]], list[Failure]]:
    """All programs on all models, the first to run changing from round to round."""
    rounds: list[list[Measurement]] = []
    failures: list[Failure] = []
    for i in range(n_rounds):
        measured: list[Measurement] = []
        turn = i % len(programs)
        for model in models:
            for program in [*programs[turn:], *programs[:turn]]:
                print(
                    f"round {i + 1}/{n_rounds}: {program.name} on {Path(model).name}",
                    file=sys.stderr,
                    flush=True,
                )
                one, failed = run_program(program, model, settings)
                measured += one
                failures += failed
                for failure in failed:
                    print(f"  {failure.test} failed: {failure.reason}", file=sys.stderr)
        rounds.append(measured)
    return rounds, failures


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when coreinfer-bench gave all its rows, whatever the peers did."""
    args = parser().parse_args(argv)
    try:
        programs = find_programs(args)
        core = core_flags(args)
        # What would go wrong after an hour of measuring is said before it.
        if not args.no_plot:
            import matplotlib  # noqa: F401
        args.out.mkdir(parents=True, exist_ok=True)
        if not os.access(args.out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(args.out))
    except (ValueError, OSError) as error:
        print(f"compare_llama_cpp: error: {error}", file=sys.stderr)
        return 1
    except ImportError:
        print(
            "compare_llama_cpp: error: the plot needs matplotlib: pip install "
            "'coreinfer-cpp[dev]', or leave it out with --no-plot",
            file=sys.stderr,
        )
        return 1
    settings = Settings(
        args.n_prompt,
        args.n_gen,
        args.n_depth,
        args.threads,
        args.repetitions,
        core,
        args.bandwidth,
        args.timeout,
    )
    rounds, failures = run_rounds(programs, args.model, settings, args.rounds)
    lines = summarize(rounds, OURS)
    table = markdown(lines, failures, [p.name for p in programs if not p.ours])
    (args.out / "comparison.md").write_text(table, encoding="utf-8")
    raw = {
        "rounds": [[asdict(m) for m in measured] for measured in rounds],
        "failures": [asdict(f) for f in failures],
    }
    (args.out / "comparison.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    if not args.no_plot and not plot(lines, OURS, args.out / "roofline.png"):
        print("compare_llama_cpp: no generation row to draw", file=sys.stderr)
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal has a sign for ÷
    print(table, end="")
    return 1 if any(f.program == OURS for f in failures) else 0


if __name__ == "__main__":
    sys.exit(main())
