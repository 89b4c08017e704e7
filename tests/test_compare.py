"""tools/compare_llama_cpp.py: programs in turn, ratios within rounds, peers that misbehave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compare_llama_cpp
from bench_programs import (
    Failure,
    Measurement,
    Program,
    Settings,
    invocations,
    parse_rows,
    run_program,
)
from bench_report import KV_BYTES, WEIGHT_BYTES, Spread, markdown, summarize
from bench_roofline import bandwidth_of, points
from compare_llama_cpp import OURS
from make_synthetic_model import make_tiny_model

# A llama-bench of few lines: a row for each -p and -n at each -d, speeds from the environment of
# the script's own text. What it was asked to do is appended to a log.
FAKE = """#!{python}
import json, os, signal, sys, time
args = sys.argv[1:]
if "--help" in args:
    sys.exit(print({help!r}))
get = lambda flag, default: args[args.index(flag) + 1] if flag in args else default
ints = lambda text: [int(v) for v in text.split(",")]
with open({log!r}, "a") as log:
    print({name!r}, *args, file=log)
rows = []
for depth in ints(get("-d", "0")):
    for key, flag in (("n_prompt", "-p"), ("n_gen", "-n")):
        for n in ints(get(flag, "0")):
            if n:
                row = {{"n_prompt": 0, "n_gen": 0, "n_depth": depth, "avg_ts": {speed}}}
                rows.append(row | {{key: n}})
{body}
"""
WELL = "print(json.dumps(rows))"


@pytest.fixture
def fake(tmp_path):
    """Makes an executable peer: fake(name, speed, body) -> path. All log to tmp_path/log."""

    def make(name: str, speed: float = 100.0, body: str = WELL, help: str = "-d") -> Path:
        path = tmp_path / name
        log = str(tmp_path / "log")
        path.write_text(
            FAKE.format(
                python=sys.executable, log=log, name=name, speed=speed, body=body, help=help
            )
        )
        path.chmod(0o755)
        return path

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("compare") / "tiny.gguf"
    make_tiny_model(path, "llama", "Q4_0")
    return str(path)


SMALL = Settings(n_prompt=(8,), n_gen=(4,), repetitions=1, bandwidth="0")


# ---- one program


def test_rows_of_a_broken_list_are_kept():
    rows = [{"a": 1}, {"b": [2, "}, {"]}]
    text = json.dumps(rows, indent=2)
    assert parse_rows(text) == rows
    assert parse_rows(text[:-1]) == rows
    assert parse_rows(text[:-6]) == rows[:1]
    assert parse_rows("noise before " + text + " and after") == rows
    assert parse_rows("") == parse_rows("[") == parse_rows("nothing") == []


def test_a_peer_that_works_gives_a_row_for_each_test(fake):
    settings = Settings(n_prompt=(8, 16), n_gen=(4,), depth=3)
    measured, failures = run_program(Program("peer", fake("peer")), "m.gguf", settings)
    assert [m.test for m in measured] == ["pp8 @ d3", "pp16 @ d3", "tg4 @ d3"]
    assert {m.tok_s for m in measured} == {100.0} and not failures


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),
        ("sys.exit('no such model')", "exit status 1: no such model"),
        ("print('hello')", "it wrote no JSON rows"),
        ("print('[')", "it wrote no JSON rows"),
        ("print(json.dumps([{'n_prompt': 8}]))", "no row for this test"),
        ("time.sleep(60)", "no end after 1 s"),
    ],
)
def test_a_peer_that_fails_is_a_failure_of_each_test_with_the_reason(fake, body, reason):
    settings = Settings(n_prompt=(8,), n_gen=(4,), timeout=1.0)
    measured, failures = run_program(Program("peer", fake("peer", body=body)), "m.gguf", settings)
    assert not measured
    assert failures == [Failure("peer", "m.gguf", test, reason) for test in ("pp8", "tg4")]


def test_rows_before_a_crash_count(fake):
    body = "print(json.dumps(rows)[:-1], flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)"
    measured, failures = run_program(Program("p", fake("p", body=body)), "m.gguf", SMALL)
    assert [m.test for m in measured] == ["pp8", "tg4"]
    assert {f.reason for f in failures} == {"killed by SIGSEGV"}
    assert {f.test for f in failures} == {"later rows"}


def test_a_binary_that_is_not_there_is_a_failure(tmp_path):
    _, failures = run_program(Program("peer", tmp_path / "nothing"), "m.gguf", SMALL)
    assert "cannot be started" in failures[0].reason


def test_peers_generate_at_the_depth_where_core_rows_do():
    settings = Settings(n_prompt=(8, 16), n_gen=(4,), depth=2, core=("--core", "off,stable"))
    (_, pp), (command, tg) = invocations(Program("peer", Path("peer")), "m", settings)
    assert pp == ["pp8 @ d2", "pp16 @ d2"]
    assert tg == ["tg4 @ d10", "tg4 @ d18"]
    assert command[command.index("-d") + 1] == "10,18"
    ((own, tests),) = invocations(Program(OURS, Path("own"), ours=True), "m", settings)
    assert tests == pp + tg and own[-2:] == ["--core", "off,stable"]


def test_peers_without_a_depth_flag_are_not_given_one():
    for command, _ in invocations(Program("peer", Path("peer")), "m", SMALL):
        assert "-d" not in command


# ---- ratios


def row(program: str, tok_s: float, core: str = "", n_bytes: int | None = None) -> Measurement:
    own: dict = {"n_prompt": 0, "n_gen": 4}
    if n_bytes:
        own |= {WEIGHT_BYTES: n_bytes - 100, KV_BYTES: 100, "read_bw_gbs": 20.0}
    return Measurement(program, "m.gguf", "tg4", core, tok_s, own)


ROUNDS = [
    [row("a", 10), row("b", 8), row(OURS, 12, "", 1000), row(OURS, 18, "flock 0.4", 600)],
    [row("a", 5), row("b", 8), row(OURS, 10, "", 1000), row(OURS, 16, "flock 0.4", 600)],
    [row("b", 10), row(OURS, 11, "", 1000), row(OURS, 22, "flock 0.4", 600)],  # a crashed
]


def test_ratios_are_taken_within_rounds():
    a, b, dense, core = summarize(ROUNDS, OURS)
    assert [line.label for line in (a, b, dense, core)] == [
        "a",
        "b",
        "coreinfer",
        "coreinfer core flock 0.4",
    ]
    assert a.tok_s == Spread(5, 7.5, 10) and not a.over_peer and a.over_best is None
    # By hand: 12/10 and 10/5; 12/8, 10/8 and 11/10; over the faster of both.
    assert dense.over_peer["a"] == Spread(1.2, pytest.approx(1.6), 2.0)
    assert dense.over_peer["b"] == Spread(1.1, 1.25, 1.5)
    assert dense.over_best == Spread(1.1, 1.2, 1.25)
    assert core.over_dense == Spread(1.5, 1.6, 2.0)
    # 1.6 times as fast with 0.6 of the bytes: 0.96 of what the bytes allow.
    assert core.of_byte_ratio.median == pytest.approx(0.96)
    assert dense.over_dense is None and dense.of_byte_ratio is None


def test_the_table_has_every_ratio_and_every_failure():
    failures = [Failure("a", "x/m.gguf", "tg4", "killed by SIGILL | really")] * 2
    text = markdown(summarize(ROUNDS, OURS), failures, ["a", "b"])
    table = [line for line in text.splitlines() if line.startswith("| m.gguf")]
    assert table[2].split(" | ")[3:7] == [
        "11.00 (10.00–12.00)",
        "1.60 (1.20–2.00)",
        "1.25 (1.10–1.50)",
        "1.20 (1.10–1.25)",
    ]
    assert "| a | m.gguf | tg4 | killed by SIGILL \\| really | 2 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| m.gguf")}
    assert len(widths) == 1


def test_points_of_peers_stand_at_the_bytes_of_the_same_file():
    lines = summarize(ROUNDS, OURS)
    mib = {line.label: x * 2**20 for _, x, line in points(lines, OURS)}
    assert mib == {"a": 1000, "b": 1000, OURS: 1000, f"{OURS} core flock 0.4": 600}
    assert bandwidth_of(lines) == 20.0


# ---- the whole tool


def run_tool(model: str, tmp_path: Path, *args: str) -> int:
    quick = ["-p", "8", "-n", "4", "-r", "1", "-t", "1", "--bandwidth", "0.01"]
    return compare_llama_cpp.main(["-m", model, *quick, "--out", str(tmp_path / "out"), *args])


def test_programs_run_in_turn_and_each_starts_a_round(fake, model, tmp_path, capsys):
    peers = [f"--peer={name}={fake(name)}" for name in ("a", "b")]
    assert run_tool(model, tmp_path, *peers, "--rounds", "3", "--no-plot") == 0
    order = [
        line.split(": ")[1].split(" on ")[0]
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("round ")
    ]
    assert order == ["a", "b", OURS, "b", OURS, "a", OURS, "a", "b"]
    log = (tmp_path / "log").read_text().splitlines()
    assert all(f"-m {model} -t 1 -r 1" in line for line in log)


def test_a_comparison_with_core_neurons_is_written_and_drawn(fake, model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    peer = f"--peer=llama={fake('llama', 123.0)}"
    assert (
        run_tool(model, tmp_path, peer, "--rounds", "2", "--beta", "0.25,0.5", "--layers", "1:")
        == 0
    )
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert capsys.readouterr().out == table
    for text in ("| llama | 123.00 (123.00–123.00)", "coreinfer core flock 0.25 1:", "÷ llama"):
        assert text in table
    raw = json.loads((tmp_path / "out" / "comparison.json").read_text())
    tests = {(m["program"], m["test"], m["core"]) for m in raw["rounds"][0]}
    cores = ("", "flock 0.25 1:", "flock 0.5 1:")
    assert tests == {("llama", t, "") for t in ("pp8", "tg4 @ d8")} | {
        (OURS, t, c) for t in ("pp8", "tg4 @ d8") for c in cores
    }
    png = (tmp_path / "out" / "roofline.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_a_peer_without_depths_generates_after_a_prompt(fake, model, tmp_path, capsys):
    """As ik_llama.cpp's does, with -gp; it has arguments of its own here, too."""
    body = """
for pair in [args[i + 1] for i, arg in enumerate(args) if arg == "-gp"]:
    p, n = ints(pair)
    row = {"n_prompt": p, "n_gen": n, "test": f"tg{n}@pp{p}", "avg_ts": 50.0}
    rows.append(row)
print(json.dumps(rows))"""
    peer = f"--peer=ik={fake('ik', body=body, help='  -gp <pp,tg>  (default: )')} -rtr 1"
    assert run_tool(model, tmp_path, peer, "--rounds", "1", "--beta", "0.5", "--no-plot") == 0
    out = capsys.readouterr().out
    assert "| tg4 @ d8 | ik | 50.00 (50.00–50.00)" in out and "| pp8 | ik | 100.00" in out
    assert "failed" not in out
    log = (tmp_path / "log").read_text()
    assert "-d " not in log and all(" -rtr 1 -m " in line for line in log.splitlines())


def test_a_peer_that_crashes_does_not_stop_the_others(fake, model, tmp_path, capsys):
    bad = fake("bad", body="os.kill(os.getpid(), signal.SIGILL)")
    peers = [f"--peer=bad={bad}", f"--peer=good={fake('good')}"]
    assert run_tool(model, tmp_path, *peers, "--rounds", "1", "--no-plot") == 0
    out = capsys.readouterr().out
    assert "| bad | tiny.gguf | pp8 | killed by SIGILL | 1 |" in out
    assert "| good | 100.00 (100.00–100.00)" in out and "| coreinfer |" in out


def test_a_failure_of_our_own_is_the_tool_s(fake, tmp_path, capsys):
    peer = f"--peer=good={fake('good')}"
    missing = str(tmp_path / "missing.gguf")
    assert run_tool(missing, tmp_path, peer, "--rounds", "1", "--no-plot") == 1
    assert "missing.gguf" in capsys.readouterr().out


def test_llama_bench_is_found_on_the_path(fake, model, tmp_path, monkeypatch, capsys):
    fake("llama-bench", 77.0)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert run_tool(model, tmp_path, "--rounds", "1", "--no-plot") == 0
    assert "| llama.cpp | 77.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--peer", "nothing"], "is not NAME=PATH"),
        (["--peer", "a=x", "--peer", "a=y"], "the name 'a' is taken"),
        (["--peer", "coreinfer=x"], "is taken"),
        (["--peer", "a='x"], '--peer "a=\'x": No closing quotation'),
        (["--peer", "a=x", "--alpha", "0.3"], "--alpha is for core rows: give --beta"),
    ],
)
def test_bad_arguments_are_an_error_before_anything_runs(tmp_path, capsys, args, message):
    assert run_tool("m.gguf", tmp_path, *args, "--no-plot") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1", "x"])
def test_a_time_that_is_none_is_a_usage_error(tmp_path, capsys, value):
    with pytest.raises(SystemExit):
        run_tool("m.gguf", tmp_path, "--peer", "a=x", f"--timeout={value}")
    assert "argument --timeout: " in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_runs(fake, tmp_path, capsys):
    peer = f"--peer=a={fake('a')}"
    (tmp_path / "out").write_text("")
    assert run_tool("m.gguf", tmp_path, peer, "--no-plot") == 1
    assert capsys.readouterr().err == (
        f"compare_llama_cpp: error: [Errno 17] File exists: '{tmp_path / 'out'}'\n"
    )
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("stdout", ["ascii", "full"])
def test_a_comparison_is_written_whatever_becomes_of_stdout(fake, model, tmp_path, stdout):
    tool, out = compare_llama_cpp.__file__, tmp_path / "out"
    argv = [sys.executable, tool, "-m", model, f"--peer=a={fake('a')}", "--out", str(out)]
    argv += ["-p", "8", "-n", "4", "-r", "1", "-t", "1", "--bandwidth", "0", "--no-plot"]
    with open("/dev/full" if stdout == "full" else tmp_path / "stdout", "w") as file:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run([*argv, "--rounds", "1"], stdout=file, env=environment)
    assert "÷ a" in (out / "comparison.md").read_text(encoding="utf-8")
    if stdout == "full":
        assert done.returncode != 0
    else:
        assert done.returncode == 0 and "\\xf7 a" in (tmp_path / "stdout").read_text()


def test_no_peer_anywhere_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_tool("m.gguf", tmp_path, "--no-plot") == 1
    assert "no llama-bench on PATH" in capsys.readouterr().err
