"""coreinfer-bench: its command line, its five formats, and what core rows stand for."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from coreinfer import _core
from coreinfer.bench import binary_path
from make_synthetic_model import make_paper_model, make_tiny_model
from synthetic_shapes import PAPER

# llama-bench's columns, in its order; its tools find theirs by these names.
LLAMA_BENCH_COLUMNS = """
build_commit build_number cpu_info gpu_info backends model_filename model_type model_size
model_n_params n_batch n_ubatch n_threads cpu_mask cpu_strict poll type_k type_v n_gpu_layers
n_cpu_moe split_mode main_gpu no_kv_offload flash_attn devices tensor_split tensor_buft_overrides
load_mode lazy_mode embeddings no_op_offload no_host repack fit_target fit_min_ctx n_prompt n_gen
n_depth test_time avg_ns stddev_ns avg_ts stddev_ts
""".split()
OWN_COLUMNS = """
test isa activation core statistic alpha weighted beta layer_first layer_last ffn_kept_frac
n_prompt_select count_ns select_ns compact_ns choice_over_read_bw patch_rank patch_ns patch_bytes
n_drafts accept acceptance compact_bytes compact_source_bytes weight_bytes_per_token
kv_bytes_per_token eff_bw_gbs read_bw_gbs read_bw_bytes read_bw_share ttft_ns break_even_tokens
verify_over_decode kv_bytes load_ns memory_limit rss peak_rss logits_hash
""".split()
TEXT_COLUMNS = """
build_commit cpu_info gpu_info backends model_filename model_type cpu_mask type_k type_v split_mode
devices tensor_split tensor_buft_overrides load_mode lazy_mode test_time test isa activation core
statistic logits_hash
""".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    make_tiny_model(path, "llama", "Q4_0")
    return str(path)


def bench(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(binary_path()), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | (env or {}),
    )
    # A build for the tests may have assertions or sanitizers, and says so in every run.
    slow = [line for line in done.stderr.splitlines(True) if line.endswith("are too slow\n")]
    for line in slow:
        done.stderr = done.stderr.replace(line, "")
    return done


def rows_of(model: str, *args: object) -> list[dict]:
    """Rows of a run that must succeed; quick unless `args` say otherwise."""
    quick = ["-m", model, "--bandwidth", 0, "-o", "json"]
    quick += ["-t", 2] if "-t" not in args else []
    done = bench(*quick, "-r", 1, *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def names(rows: list[dict]) -> list[str]:
    return [row["test"] for row in rows]


# ---- lists and ranges


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("5", [5]),
        ("3,1,3", [3, 1, 3]),
        ("4-7", [4, 5, 6, 7]),
        ("4-9+2", [4, 6, 8]),
        ("2-16*2", [2, 4, 8, 16]),
        ("3-20*2,1-2", [3, 6, 12, 1, 2]),
        ("7-7", [7]),
    ],
)
def test_lists_and_ranges_are_run_value_by_value(model, text, values):
    rows = rows_of(model, "-p", text, "-n", 0)
    assert [row["n_prompt"] for row in rows] == values
    assert names(rows) == [f"pp{v}" for v in values]


def test_a_repeated_flag_adds_values_to_those_given_and_not_to_the_default(model):
    assert names(rows_of(model, "-p", 2, "-p", "3,4", "-n", 0)) == ["pp2", "pp3", "pp4"]


def test_every_combination_of_lists_is_run(model):
    args = ["-p", "4", "-n", "2", "-pg", "3,1", "-d", "0,5", "-t", "1,2", "-ub", "2,512"]
    rows = rows_of(model, *args, "-ctk", "f16,f32")
    settings = {(r["n_threads"], r["n_ubatch"], r["type_k"], r["test"]) for r in rows}
    tests = ["pp4", "tg2", "pp3+tg1", "pp4 @ d5", "tg2 @ d5", "pp3+tg1 @ d5"]
    assert settings == {
        (t, ub, k, test)
        for t in (1, 2)
        for ub in (2, 512)
        for k in ("f16", "f32")
        for test in tests
    }
    assert len(rows) == 2 * 2 * 2 * len(tests)


def test_zero_leaves_a_kind_of_test_out(model):
    assert names(rows_of(model, "-p", 0, "-n", 2)) == ["tg2"]
    assert names(rows_of(model, "-p", 2, "-n", 0)) == ["pp2"]
    assert names(rows_of(model, "-p", 0, "-n", 0, "-pg", "2,1")) == ["pp2+tg1"]


# ---- bad arguments


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", "x"], '-p: "x" is not a whole number'),
        (["-p", "5-"], '-p: "" is not a whole number'),
        (["-p", "5,,4"], "empty member"),
        (["-p", "9-5"], "its end lies before its start"),
        (["-p", "1-5+0"], "a range that grows"),
        (["-p", "0-5*2"], "a range that grows"),
        (["-p", "1-9*1"], "a range that grows"),
        (["-p", "1-1000000"], "at most 10000 values"),
        (["-p", "-5"], "-p is -5, expected 0 to"),
        (["-n", "99999999999999999999"], "expected 0 to"),
        (["-t", "0"], "-t is 0, expected at least 1"),
        (["-b", "0"], "-b is 0, expected at least 1"),
        (["--verify", "17"], "--verify is 17, expected 0 to 16"),
        (["-pg", "5"], '-pg: "5" is not PROMPT,GENERATED'),
        (["-r", "0"], "-r is 0, expected 1 to"),
        (["-ctk", "q4_0"], 'cache type is "q4_0", expected f16, f32 or q8_0'),
        (["-o", "xml"], '-o is "xml", expected one of md, csv, json, jsonl, sql'),
        (["-ngl", "-2"], "-ngl is -2, expected -1 to"),
        (["-mg", "1024"], "-mg is 1024, expected 0 to 1023"),
        (["--core", "sometimes"], '--core is "sometimes", expected one of off, stable, exact'),
        (["--statistic", "mean"], "mean"),
        (["--beta", "0"], "--beta is 0, expected more than 0 and at most 1"),
        (["--alpha", "1.5"], "--alpha is 1.5, expected more than 0 and at most 1"),
        (["--beta", "0,4"], "--beta is 0, expected"),
        (["--beta", "nan"], "--beta"),
        (["--layers", "3"], '--layers: "3" is not FIRST:LAST'),
        (["--layers", "3:3"], "has no layer"),
        (["--layers", "2:9", "--core", "stable", "-p", "4"], "has layers 0:3"),
        (["--drafts", "16"], "expected 0 to 15"),
        (["--patch", "2000"], "expected 0 to 1024"),
        (["--core", "exact", "--verify", "2"], "decoding verifies by itself there"),
        (["--bandwidth", "-1"], "--bandwidth is -1, expected 0 (skip) to 1024 GiB"),
        (["-p"], "-p needs a value"),
        (["-p", "0", "-n", "0"], "no test to run"),
        (["--frobnicate"], 'unknown argument "--frobnicate"'),
        (["-mmp", "0"], "llama-bench's -mmp has no meaning here: model files are always mapped"),
        (["-mmp", "1,0"], "llama-bench's -mmp has no meaning here"),
        (["-mmp"], "llama-bench's -mmp has no meaning here"),
        (["--memory-limit", "2G"], '"2G" is not a size in bytes, for example 2GiB or 500MB'),
        (["--memory-limit", "0"], '"0" is not a size in bytes'),
        (["--memory-limit", "1MiB"], "memory_limit is 1.0 MiB, but"),
        (["--activation", ""], '--activation is "", expected one of silu, '),
        (["--activation", "swish2"], '--activation is "swish2", expected one of silu, '),
        (["-hf", "a/b"], "give the path of a GGUF file with -m"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written_to_stdout(model, args, message):
    done = bench("-m", model, "--bandwidth", 0, "-o", "csv", *args)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") <= 2  # a note and the error, no dump
    assert len(done.stdout.splitlines()) <= 1  # at most the header


def test_flags_of_llama_bench_that_change_nothing_are_taken_and_said(model):
    given = ["-fa", "0,1", "-mmp", "1", "--poll", "50", "-nkvo", "0", "-sm", "layer", "--prio", "0"]
    done = bench("-m", model, "-p", 2, "-n", 0, "-r", 1, "--bandwidth", 0, "-o", "json", *given)
    assert done.returncode == 0
    assert len(json.loads(done.stdout)) == 1
    notes = done.stderr.splitlines()
    assert len(notes) == 6
    for flag, note in zip(given[::2], notes, strict=True):
        assert f"llama-bench's {flag} has no meaning here" in note


def test_a_model_is_required():
    done = bench("-p", 4)
    assert done.returncode == 1 and "-m" in done.stderr and not done.stdout


def test_help_version_and_devices_need_no_model():
    for flag, text in [
        ("--help", "--verify N"),
        ("--version", "coreinfer-bench 0"),
        ("--list-devices", "CPU: "),
    ]:
        done = bench(flag)
        assert done.returncode == 0 and text in done.stdout and not done.stderr


# ---- formats


def parsed(fmt: str, text: str) -> list[dict[str, str | None]]:
    """Rows of any format as text, without the samples; None for what has no meaning."""
    if fmt == "csv":
        rows = [{k: v or None for k, v in row.items()} for row in csv.DictReader(io.StringIO(text))]
        return rows
    if fmt == "sql":
        with sqlite3.connect(":memory:") as db:
            db.executescript(text)
            cursor = db.execute("SELECT * FROM llama_bench")
            fields = [column[0] for column in cursor.description]
            found = [dict(zip(fields, row, strict=True)) for row in cursor]
    else:
        found = json.loads(text) if fmt == "json" else [json.loads(s) for s in text.splitlines()]
    for row in found:
        row.pop("samples_ns", None)
        row.pop("samples_ts", None)
        for name, value in row.items():
            if value is not None and not isinstance(value, str):
                number = int(value) if isinstance(value, bool | int) else f"{value:f}"
                row[name] = str(number)
            row[name] = row[name] or None
    return found


@pytest.mark.parametrize(("out", "err"), [("json", "csv"), ("jsonl", "sql"), ("csv", "sql")])
def test_formats_say_the_same_of_the_same_run(model, out, err):
    args = ["-m", model, "-p", 4, "-n", 2, "-r", 2, "--bandwidth", 0, "-o", out, "-oe", err]
    done = bench(*args)
    assert done.returncode == 0
    rows = parsed(out, done.stdout)
    assert [list(row) for row in rows] == [LLAMA_BENCH_COLUMNS + OWN_COLUMNS] * 2
    assert rows == parsed(err, done.stderr)


def test_json_has_types_and_samples(model):
    (row,) = rows_of(model, "-p", 0, "-n", 3, "-r", 4)
    assert list(row) == LLAMA_BENCH_COLUMNS + OWN_COLUMNS + ["samples_ns", "samples_ts"]
    for name, value in row.items():
        if name in TEXT_COLUMNS:
            assert value is None or isinstance(value, str), name
        elif not name.startswith("samples"):
            assert value is None or isinstance(value, int | float), name
    assert row["cpu_strict"] is False and row["repack"] is True
    assert len(row["samples_ns"]) == len(row["samples_ts"]) == 4
    ns = np.array(row["samples_ns"], float)
    # Printed as whole nanoseconds, and tokens per second with six decimals (samples: six digits).
    assert row["avg_ns"] == pytest.approx(ns.mean(), abs=1)
    assert row["stddev_ns"] == pytest.approx(ns.std(ddof=1), abs=1)
    assert row["avg_ts"] == pytest.approx((3e9 / ns).mean(), abs=1e-5)
    assert row["stddev_ts"] == pytest.approx((3e9 / ns).std(ddof=1), abs=1e-5)
    assert row["samples_ts"] == pytest.approx(list(3e9 / ns), rel=1e-5)


def test_sql_columns_have_llama_bench_types(model):
    done = bench("-m", model, "-p", 2, "-n", 0, "-r", 1, "--bandwidth", 0, "-o", "sql")
    with sqlite3.connect(":memory:") as db:
        db.executescript(done.stdout)
        db.executescript(done.stdout)  # a second run goes into the same table
        types = {row[1]: row[2] for row in db.execute("PRAGMA table_info(llama_bench)")}
        assert db.execute("SELECT count(*) FROM llama_bench").fetchone() == (2,)
    assert [types[name] for name in TEXT_COLUMNS] == ["TEXT"] * len(TEXT_COLUMNS)
    assert types["avg_ts"] == types["stddev_ts"] == types["beta"] == "REAL"
    assert types["avg_ns"] == types["cpu_strict"] == types["n_gen"] == "INTEGER"


@pytest.mark.parametrize("fmt", ["csv", "json", "jsonl", "sql"])
def test_names_with_quotes_survive_every_format(tmp_path, fmt):
    path = tmp_path / 'it\'s "quoted", \\ and\nbroken.gguf'
    make_tiny_model(path, "llama", "F32", n_layer=1)
    done = bench("-m", path, "-p", 2, "-n", 0, "-r", 1, "--bandwidth", 0, "-o", fmt)
    # A comma separates models, so the path itself must not have one for -m.
    assert done.returncode == 1
    path = path.rename(tmp_path / 'it\'s "quoted" \\ and\nbroken.gguf')
    done = bench("-m", path, "-p", 2, "-n", 0, "-r", 1, "--bandwidth", 0, "-o", fmt)
    assert done.returncode == 0, done.stderr
    assert [row["model_filename"] for row in parsed(fmt, done.stdout)] == [str(path)]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def test_markdown_is_an_aligned_table_with_llama_bench_columns_first(model):
    args = ["-m", model, "-p", 4, "-n", 2, "-r", 2, "-t", 2, "--bandwidth", 0]
    head, rule, *rows, blank, build = bench(*args).stdout.splitlines()
    assert cells(head)[:7] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert [cells(row)[5] for row in rows] == ["pp4", "tg2"]
    assert cells(rows[0])[:5] == ["llama 2M Q4_0", "1.04 MiB", "1.94 M", "CPU", "2"]
    mean, deviation = cells(rows[0])[6].split(" ± ")
    assert float(mean) > 0.0 and float(deviation) >= 0.0
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    aligned = [cell.endswith(":") for cell in cells(rule)]
    assert aligned[:7] == [False, True, True, False, True, True, True]
    assert not blank and build.startswith("build: ")


def test_markdown_stays_aligned_with_long_names_of_core_settings(model):
    args = ["-m", model, "-p", 4, "-n", 0, "-r", 1, "--bandwidth", 0, "--core", "stable"]
    done = bench(*args, "--statistic", "count_gate", "--alpha", 0.25, "--layers", "1:2")
    head, rule, dense, core, _, _ = done.stdout.splitlines()
    at = cells(head).index("core")
    assert [cells(dense)[at], cells(core)[at]] == ["off", "count_gate(0.25) 0.4 1:2"]
    assert len({len(line) for line in (head, rule, dense, core)}) == 1


def test_markdown_shows_a_setting_that_is_not_the_default(model):
    done = bench("-m", model, "-p", 4, "-n", 0, "-r", 1, "--bandwidth", 0, "-ctk", "f16,q8_0")
    head, _, *rows, _, _ = done.stdout.splitlines()
    at = cells(head).index("type_k")
    assert [cells(row)[at] for row in rows] == ["f16", "q8_0"]
    assert "type_v" not in cells(head)


def test_numbers_have_a_point_whatever_the_locale(model):
    args = ["-m", model, "-p", 2, "-n", 0, "-r", 1, "--bandwidth", "0.001", "-o", "csv"]
    done = bench(*args, env={"LC_ALL": "de_DE.UTF-8", "LC_NUMERIC": "de_DE.UTF-8"})
    assert done.returncode == 0
    (row,) = csv.DictReader(io.StringIO(done.stdout))
    assert float(row["avg_ts"]) > 0.0


# ---- conduct


def test_stdout_has_results_only_and_stderr_the_rest(model):
    args = ["-m", model, "-p", 4, "-n", 0, "-r", 2, "--bandwidth", 0, "-o", "json"]
    quiet, loud = bench(*args), bench(*args, "--progress", "-v")
    assert quiet.stderr == ""
    assert names(json.loads(loud.stdout)) == ["pp4"]
    assert "test 1/1: pp4, core off: warm-up" in loud.stderr
    assert "repetition 2/2" in loud.stderr and " ms\n" in loud.stderr
    assert "warm-up" not in bench(*args, "--progress", "--no-warmup").stderr


@pytest.mark.parametrize("fmt", ["json", "csv"])
def test_a_failure_keeps_the_rows_before_it_and_exits_with_1(model, fmt, tmp_path):
    missing = tmp_path / "missing.gguf"
    both = f"{model},{missing}"
    done = bench("-m", both, "-p", 2, "-n", 0, "-r", 1, "--bandwidth", 0, "-o", fmt)
    assert done.returncode == 1
    assert str(missing) in done.stderr
    assert [row["model_filename"] for row in parsed(fmt, done.stdout)] == [model]


@pytest.mark.parametrize(
    "arguments",
    ["-m {model} -p 2 -n 0 -r 1 --bandwidth 0", "--help", "--version", "--list-devices"],
)
def test_results_that_cannot_be_written_are_a_failure(model, arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [str(binary_path()), *arguments.format(model=model).split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1 and "could not be written to stdout" in done.stderr


def test_the_console_script_becomes_the_binary():
    program = "import coreinfer.bench as b; raise SystemExit(b.main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout == bench("--version").stdout


# ---- token ids and the hash of the logits


def hash_of(logits: list[np.ndarray]) -> str:
    """The binary's hash, written again from its description: 8 lanes of 64-bit words."""
    mask = (1 << 64) - 1
    lanes = list(range(1, 9))
    for row in logits:
        padded = np.zeros(len(row) // 16 * 16 + 16, np.float32)  # a tail step, also when empty
        padded[: len(row)] = row
        for step in padded.view(np.uint64).reshape(-1, 8).tolist():
            for i, word in enumerate(step):
                turned = ((lanes[i] << 27) | (lanes[i] >> 37)) & mask
                lanes[i] = ((turned ^ word) * 0x9E3779B97F4A7C15) & mask
    value = 0
    for lane in lanes:
        value ^= lane
        value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & mask
        value ^= value >> 32
    return f"{value:016x}"


TOKENS = [5, 17, 301, 2, 2, 88, 140, 9, 31, 64]


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text(" ".join(map(str, TOKENS)) + "\n")
    return path


def test_the_hash_is_that_of_all_logits_of_the_given_tokens(model, token_file):
    rows = rows_of(model, "-p", 4, "-n", 3, "-d", 2, "-pg", "4,2", "--tokens", token_file)
    session = _core.Session(_core.Engine(model, n_threads=1))
    ids = np.array(TOKENS, np.int32)
    expected = []
    for n_prompt, n_gen in [(4, 0), (0, 3), (4, 2)]:
        session.reset()
        session.prefill(ids[:2])
        logits = []
        if n_prompt:
            session.prefill(ids[2 : 2 + n_prompt])
            logits.append(session.logits())
        for token in ids[2 + n_prompt : 2 + n_prompt + n_gen]:
            session.decode(int(token))
            logits.append(session.logits())
        expected.append(hash_of(logits))
    assert names(rows) == ["pp4 @ d2", "tg3 @ d2", "pp4+tg2 @ d2"]
    assert [row["logits_hash"] for row in rows] == expected


def test_a_core_row_hashes_the_logits_of_the_core_weights(model, token_file):
    args = ["-p", 6, "-n", 3, "--tokens", token_file, "--core", "stable", "--beta", 0.25]
    rows = rows_of(model, *args, "--statistic", "count", "--alpha", 0.3, "--layers", "1:")
    session = _core.Session(_core.Engine(model, n_threads=1))
    ids = np.array(TOKENS, np.int32)
    session.prefill(ids[:6], statistic="count", alpha=0.3)
    session.set_core(session.select(beta=0.25, layers=(1, 3)))
    logits = []
    for token in ids[6:9]:
        session.decode(int(token))
        logits.append(session.logits())
    core = rows[3]
    assert (core["test"], core["core"]) == ("tg3 @ d6", "stable")
    assert core["logits_hash"] == hash_of(logits) != rows[2]["logits_hash"]


def test_a_token_file_may_be_a_json_list_or_what_coreinfer_tokenize_prints(
    model, token_file, tmp_path
):
    listed, printed = tmp_path / "ids.json", tmp_path / "ids.tsv"
    listed.write_text(json.dumps(TOKENS, indent=2))
    printed.write_text("".join(f'{t}\t" 7 t{i}"\n' for i, t in enumerate(TOKENS)))
    hashes = [
        rows_of(model, "-p", len(TOKENS), "-n", 0, "--tokens", f)[0]["logits_hash"]
        for f in (token_file, listed, printed)
    ]
    assert len(set(hashes)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3", "has 3 ids, but a test needs 4"),
        ("1 2 99999 4", "id 99999 at position 2, expected less than 320"),
        ("1 2 three 4", '"three" is not a whole number'),
        ("[1, 2, 3, 4", 'no closing "]"'),
        ("[1, 2,, 4]", '"" is not a whole number'),
        ("[1, 2, 3, 4,]", '"" is not a whole number'),
        ("-1 2 3 4", "expected 0 to"),
        (" \n", "has no ids"),
        ("[]", "has no ids"),
    ],
)
def test_a_bad_token_file_is_an_error(model, tmp_path, text, message):
    path = tmp_path / "ids"
    path.write_text(text)
    done = bench("-m", model, "-p", 4, "-n", 0, "--bandwidth", 0, "--tokens", path)
    assert done.returncode == 1 and message in done.stderr


def test_a_folder_is_no_token_file(model, tmp_path):
    done = bench("-m", model, "-p", 4, "-n", 0, "--bandwidth", 0, "--tokens", tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(f"cannot read the token file {tmp_path}: it is a folder\n")


def test_what_tokenize_prints_for_programs_is_refused_as_a_token_file(model, tmp_path):
    path = tmp_path / "ids"
    path.write_text('{"ids": [1, 2, 3, 4]}')
    done = bench("-m", model, "-p", 4, "-n", 0, "--bandwidth", 0, "--tokens", path)
    assert done.returncode == 1 and "`coreinfer tokenize` without --json" in done.stderr


def test_the_user_s_activation_stands_in_for_the_file_s(model, tmp_path):
    same = tmp_path / "relu.gguf"
    make_tiny_model(same, "llama", "Q4_0", activation="relu")
    args = ["-p", 8, "-n", 0]
    (plain,), (said,), (file,) = (
        rows_of(model, *args),
        rows_of(model, *args, "--activation", "relu"),
        rows_of(str(same), *args),
    )
    assert [row["activation"] for row in (plain, said, file)] == ["silu", "relu", "relu"]
    assert said["logits_hash"] == file["logits_hash"] != plain["logits_hash"]


def test_drawn_ids_depend_on_the_seed_only(model):
    def hashes(*args: object) -> list[str]:
        return [row["logits_hash"] for row in rows_of(model, "-p", 8, "-n", 2, *args)]

    assert hashes("-t", 1) == hashes("-t", 2, "-r", 3) == hashes("--seed", 0)
    assert hashes("--seed", 1)[0] != hashes("--seed", 0)[0]


# ---- core rows


def test_each_core_row_stands_under_the_dense_row_of_its_setting(model):
    args = ["-p", "8,16", "-n", 2, "--core", "stable", "--statistic", "count,flock"]
    rows = rows_of(model, *args, "--alpha", "0.2,0.4", "--beta", 0.5)
    assert names(rows[::4]) == ["pp8", "pp16", "tg2 @ d8", "tg2 @ d16"]
    for first in range(0, len(rows), 4):
        group = rows[first : first + 4]
        assert len({row["test"] for row in group}) == 1
        chosen = [(r["core"], r["statistic"], r["alpha"], r["beta"]) for r in group]
        # flock has no alpha, so it is one row for both.
        assert chosen == [
            ("off", None, None, None),
            ("stable", "count", 0.2, 0.5),
            ("stable", "count", 0.4, 0.5),
            ("stable", "flock", None, 0.5),
        ]
        assert len({row["model_type"] for row in group}) == 4


def test_generation_with_core_neurons_follows_a_prefill_and_dense_rows_do_too(model):
    rows = rows_of(model, "-p", 8, "-n", 2, "-d", 3, "--core", "off,stable")
    assert names(rows) == ["pp8 @ d3"] * 2 + ["tg2 @ d11"] * 2
    assert [row["n_depth"] for row in rows] == [3, 3, 11, 11]
    assert [row["n_prompt_select"] for row in rows] == [None, 11, None, 11]


@pytest.mark.parametrize("args", [["-n", 4], ["-n", 0, "--verify", 2]])
def test_core_rows_without_a_prompt_are_refused(model, args):
    done = bench("-m", model, "-p", 0, *args, "--core", "stable", "--bandwidth", 0)
    assert done.returncode == 1 and "has no prompt to choose them from" in done.stderr
    assert not done.stdout


def test_depth_or_pg_give_core_rows_their_prompt(model):
    rows = rows_of(model, "-p", 0, "-n", 2, "-d", 6, "-pg", "5,2", "--core", "stable")
    assert names(rows) == ["tg2 @ d6"] * 2 + ["pp5+tg2 @ d6"] * 2
    assert [row["n_prompt_select"] for row in rows] == [None, 6, None, 11]


def test_core_rows_report_what_was_kept_and_what_it_cost(model):
    dense, core = rows_of(model, "-p", 32, "-n", 4, "--core", "stable", "--beta", 0.25)[2:]
    # 3 layers of 512 neurons; select keeps 128 of each that are active, which 32 tokens make all.
    assert core["ffn_kept_frac"] == 0.25 and dense["ffn_kept_frac"] == 1.0
    assert (core["layer_first"], core["layer_last"]) == (0, 3)
    assert core["weight_bytes_per_token"] < dense["weight_bytes_per_token"]
    for name in ("count_ns", "select_ns", "compact_ns", "compact_bytes", "compact_source_bytes"):
        assert core[name] > 0 and dense[name] is None, name
    assert core["ttft_ns"] > core["select_ns"] + core["compact_ns"]
    # Six decimals are printed; GB/s is bytes per nanosecond.
    step = core["weight_bytes_per_token"] + core["kv_bytes_per_token"]
    assert core["eff_bw_gbs"] == pytest.approx(step * core["n_gen"] / core["avg_ns"], rel=1e-4)
    saved = dense["avg_ns"] / 4 - core["avg_ns"] / 4
    if saved > 0:
        spent = core["select_ns"] + core["compact_ns"]
        # avg_ns is rounded to a nanosecond: an error of a quarter in each of two times.
        assert core["break_even_tokens"] == pytest.approx(spent / saved, rel=0.5 / saved + 1e-4)
    else:
        assert core["break_even_tokens"] is None


def test_a_patched_row_reads_and_waits_for_its_patch(model):
    plain, patched = rows_of(
        model, "-p", 32, "-n", 3, "-d", 5, "-r", 2, "--core", "stable", "--patch", "0,8"
    )[4:]
    assert (plain["patch_rank"], patched["patch_rank"]) == (0, 8)
    assert plain["patch_ns"] is None and patched["patch_ns"] > 0 and patched["patch_bytes"] > 0
    extra = patched["weight_bytes_per_token"] - plain["weight_bytes_per_token"]
    assert extra == patched["patch_bytes"]
    assert patched["logits_hash"] != plain["logits_hash"]


def test_a_patch_is_the_same_in_every_repetition_with_a_depth(model):
    done = bench(
        *("-m", model, "-p", 0, "-n", 0, "-pg", "8,3", "-d", 6, "-r", 3, "--bandwidth", 0),
        *("--core", "stable", "--patch", 4),
    )
    assert done.returncode == 0, done.stderr


def test_exact_rows_draft_and_give_the_dense_logits(model):
    args = ["-p", 6, "-n", 12, "-r", 3, "--core", "exact", "--drafts", "0,3"]
    dense, none, drafted = rows_of(model, *args, "--accept", 0.5)[3:]
    assert [r["core"] for r in (dense, none, drafted)] == ["off", "exact", "exact"]
    # Without drafts the text is that of the dense row, and so are the logits.
    assert none["logits_hash"] == dense["logits_hash"]
    assert none["acceptance"] is None and none["n_drafts"] == 0
    assert 0 < drafted["acceptance"] < 1 and drafted["accept"] == 0.5
    assert drafted["compact_bytes"] > 0 and drafted["weight_bytes_per_token"] is None


def test_drafts_that_are_forced_to_come_true_do(model):
    row = rows_of(model, "-p", 6, "-n", 11, "--core", "exact", "--accept", 1, "--drafts", 2)[3]
    assert row["acceptance"] == 1.0


def test_layers_outside_the_range_stay_dense(model):
    rows = rows_of(
        model, "-p", 32, "-n", 1, "--core", "stable", "--beta", 0.25, "--layers", ":1,2:"
    )
    kept = {(r["layer_first"], r["layer_last"]): r["ffn_kept_frac"] for r in rows if r["beta"]}
    assert kept == {(0, 1): 0.75, (2, 3): 0.75}


def test_a_timed_prompt_includes_choosing_and_compacting(model):
    # One token, so that the prompt itself is a small part of the time.
    dense, core = rows_of(model, "-p", 1, "-n", 0, "--core", "stable", "-r", 3)
    for row in (dense, core):
        assert row["ttft_ns"] == row["avg_ns"]
    assert core["avg_ns"] > core["count_ns"] + core["select_ns"] + core["compact_ns"]


def test_every_repetition_compacts_anew(model):
    core = rows_of(model, "-p", 8, "-n", 1, "--core", "stable", "-r", 4)[3]
    # Moving the bytes takes longer than at 200 GB/s, also in a cache, and on a busy machine longer
    # still; keeping the core weights of an earlier repetition would not.
    moved = core["compact_bytes"] + core["compact_source_bytes"]
    assert core["compact_ns"] > moved / 200


def test_a_step_reads_the_keys_and_values_before_it(tmp_path):
    shape = {"n_head": 8, "n_head_kv": 2, "head_dim": 32, "sliding_window": 3}
    path = tmp_path / "gemma3.gguf"
    make_tiny_model(path, "gemma3", "Q4_0", **shape)
    rows = rows_of(path, "-p", 2, "-n", 4, "-pg", "1,2", "--verify", "2", "-ctv", "q8_0")
    # Six layers look at three positions at most, one at all.
    tg = (6 * (1 + 2 + 3 + 3) + (1 + 2 + 3 + 4)) / 4
    pg, verify = (6 * (2 + 3) + (2 + 3)) / 2, 6 * 2 + 2
    position = 2 * (32 * 2 + 32 + 2)  # two heads of f16 keys, and codes and a scale of values
    steps = {"tg4": tg, "pp1+tg2": pg, "verify2": verify}
    found = {row["test"]: row["kv_bytes_per_token"] for row in rows}
    assert found == {"pp2": None} | {test: int(position * n) for test, n in steps.items()}


def test_verification_is_measured_against_a_decode_step(model, token_file):
    args = ["-p", 4, "-n", 0, "--verify", 3, "--tokens", token_file, "--core", "stable"]
    rows = rows_of(model, *args, "-r", 2)[2:]
    assert names(rows) == ["verify3 @ d4"] * 2
    for row in rows:
        assert row["verify_over_decode"] > 0.0
        ns = np.array(row["samples_ns"], float)
        assert row["samples_ts"] == pytest.approx(list(3e9 / ns), rel=1e-5)
        step = row["weight_bytes_per_token"] + row["kv_bytes_per_token"]  # once for all three
        assert row["eff_bw_gbs"] == pytest.approx(step / row["avg_ns"], rel=1e-4)
    session = _core.Session(_core.Engine(model, n_threads=1))
    ids = np.array(TOKENS, np.int32)
    logits = []
    for _ in range(8):  # rounds of a repetition: one decode step, one verification
        session.reset()
        session.prefill(ids[:4])
        session.decode(int(ids[4]))
        logits.append(session.logits())
        session.reset()
        session.prefill(ids[:4])
        logits.append(session.verify(ids[4:7]).ravel())
    assert rows[0]["logits_hash"] == hash_of(logits)


def test_a_verification_is_timed_and_not_the_step_beside_it(model):
    tg, verify = rows_of(model, "-p", 0, "-n", 16, "--verify", 16, "-r", 8, "-t", 1)
    # The quickest repetitions: a busy machine only adds time. 16 rows of float arithmetic take
    # several times as long as one in a model that lies in the cache.
    ratio = min(verify["samples_ns"]) / (min(tg["samples_ns"]) / 16)
    assert ratio > 2.0 and verify["verify_over_decode"] > 2.0


# ---- the machine


def test_read_bandwidth_is_measured_over_the_memory_asked_for(model):
    args = ["-m", model, "-p", 0, "-n", 2, "-r", 1, "-t", "1,2", "-o", "json"]
    done = bench(*args, "--bandwidth", 8 / 1024)
    rows = json.loads(done.stdout)
    for row in rows:
        assert row["read_bw_bytes"] == 8 << 20
        assert row["read_bw_gbs"] > 0.0
        share = row["eff_bw_gbs"] / row["read_bw_gbs"]
        assert row["read_bw_share"] == pytest.approx(share, rel=1e-3)


def test_memory_for_the_bandwidth_is_not_in_the_peak_of_the_rows(model):
    args = ["-m", model, "-p", 2, "-n", 0, "-r", 1, "-o", "json", "--bandwidth", 0.25]
    (row,) = json.loads(bench(*args).stdout)
    assert 0 < row["peak_rss"] < 128 << 20  # half of what was read; the tiny model needs few MiB


def test_core_rows_hold_what_they_compute_with_under_a_memory_limit(tmp_path):
    """The limit that a refusal names is enough, is kept, and changes no bit."""
    path = tmp_path / "wide.gguf"  # 54 MB of FFN weights, little else
    shape = PAPER["llama2-7b"]
    shape = replace(shape, n_layer=4, n_embd=512, n_ff=8192, n_head=8, n_head_kv=2, n_vocab=512)
    make_paper_model(path, shape, "Q8_0")
    args = ["-m", path, "-p", 32, "-n", 2, "-r", 2, "--core", "stable", "--beta", 0.2, "-t", 2]
    args += ["--bandwidth", 0, "-o", "json"]
    refused = bench(*args, "--memory-limit", "1MB")
    assert refused.returncode == 1 and "lower beta" in refused.stderr
    needed = re.search(r"but (\d+) MiB are needed for the process \((\S+)\)", refused.stderr)
    # The refusal is of the prompt's test; the other has a longer context.
    limited = bench(*args, "--memory-limit", f"{int(needed[1]) + 1}MiB")
    assert limited.returncode == 0, limited.stderr
    rows, free = json.loads(limited.stdout), json.loads(bench(*args).stdout)
    assert [row["logits_hash"] for row in rows] == [row["logits_hash"] for row in free]
    for row in rows:
        assert row["memory_limit"] == (int(needed[1]) + 1) << 20
        assert row["rss"] <= row["peak_rss"] <= row["memory_limit"]
        assert row["choice_over_read_bw"] is None
    core = rows[-1]
    held = float(needed[2]) * (1 << 20) + core["weight_bytes_per_token"] + core["kv_bytes"]
    assert core["rss"] <= held + (8 << 20)  # batches' workspace, and what is not worth counting
    assert free[0]["memory_limit"] is None and free[-1]["rss"] > core["rss"] + (40 << 20)


def test_peak_memory_and_model_facts_are_reported(model):
    (row,) = rows_of(model, "-p", 2, "-n", 0)
    assert row["model_type"] == "llama 2M Q4_0"
    assert row["model_size"] < os.path.getsize(model) < row["model_size"] + (64 << 10)
    assert row["backends"] == "CPU" and row["isa"] in _core.testing.available_isas()
    assert row["kv_bytes"] > 0 and row["load_ns"] > 0
    assert row["test_time"].endswith("Z") and len(row["test_time"]) == 20
