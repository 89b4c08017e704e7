"""The device report without a device: it says so and ends; its arithmetic on given figures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections import ChainMap
from pathlib import Path

import pytest

import device_paper
import device_report
import device_targets
from coreinfer import _core
from cuda_host.build import NoCompiler, host_library
from cuda_host.target import HAS_DEVICE
from device_report import Report, joined
from make_synthetic_model import make_tiny_model
from synthetic_shapes import PAPER

TOOL = Path(__file__).resolve().parent.parent / "tools" / "device_report.py"


def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOL), "--out", str(tmp_path / "out"), "--work", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PATH": str(tmp_path)},  # no nvidia-smi there
    )
    assert done.returncode == 1
    assert done.stderr == ""
    assert "no NVIDIA GPU that its driver can see: nothing was measured" in done.stdout
    (stage,) = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (stage["name"], stage["ok"]) == ("device", False)
    assert "not measured" in (tmp_path / "out" / "report.md").read_text()


def test_every_family_of_kernels_is_in_what_the_sanitizers_run():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--no-header", "-o", "addopts=--import-mode=importlib", device_report.SMALL],
        cwd=device_report.ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"COREINFER_TEST_TARGETS": "device"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[host" not in done.stdout
    for wanted in """
        norm add products[device-F32] products[device-F16] products[device-BF16]
        products[device-Q4_0] products[device-Q4_K] products[device-Q6_K] products[device-Q8_0]
        hidden[device-F16] hidden[device-Q4_0] gather[device-F16] gather[device-Q4_0]
        counts[device-count] counts[device-count_gate] counts[device-count_abs]
        counts[device-flock] selection attention_and_rope[device-f16]
        attention_and_rope[device-q8_0] graphs_and_batches streamed_layers
    """.split():
        assert f"::test_{wanted}" in done.stdout, wanted


@pytest.mark.skipif(HAS_DEVICE, reason="there is a device here")
def test_a_target_that_was_named_and_is_not_there_is_a_failure():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-k",
            "add",
            device_report.SMALL,
        ],
        cwd=device_report.ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"COREINFER_TEST_TARGETS": "device"},
    )
    assert done.returncode == 1
    assert "this build cannot use the CUDA device" in done.stdout


class SlowReport(Report):
    """Every command takes all of its time, by a clock of its own, and ends well."""

    def __init__(self, folder, seconds, kept):
        super().__init__(folder, folder, seconds, kept)
        self.commands, self.ends = {}, {}

    def execute(self, command, limit, cwd):
        device_report.time.now += limit
        return "", True, ""

    def lacks(self, *modules):
        return ""

    def together(self, jobs):
        start, ends = device_report.time.now, []
        for job in jobs:
            device_report.time.now = start
            self.run(*job, self.left())
            ends.append(device_report.time.now)
        device_report.time.now = max(ends)

    def run(self, name, command, limit, cwd=device_report.ROOT, *, rows=False):
        self.commands[name] = list(map(str, command))
        stage = super().run(name, command, limit, cwd, rows=rows)
        self.ends[name] = device_report.time.now
        return stage


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def slow(tmp_path, monkeypatch):
    monkeypatch.setattr(device_report, "time", Clock())
    model, golden = tmp_path / "m.gguf", tmp_path / "g.json"
    model.write_bytes(b"")
    args = Namespace(wheels=tmp_path, llama_bench=None, model=[model], golden=golden)

    def run(seconds, kept=()):
        report = SlowReport(tmp_path, seconds, kept)
        assert device_report.everything(report, args)
        return report

    return run


def test_the_last_stages_are_reached_when_every_one_takes_all_its_time(slow):
    report = slow(device_report.DEADLINE)
    assert device_report.time.now <= 1000 + device_report.DEADLINE
    notes = {stage.name: stage.note for stage in report.stages}
    checks = ["tests, kernels", "tests, engine", "tests, sessions"]
    checks += ["sanitizer memcheck", "sanitizer racecheck"]
    names = [*device_report.BEFORE, "make llama2-7b f16", "golden", *checks]
    assert [n for n in notes if n in names] == names
    for name in names:
        assert "left out" not in notes[name], name
    assert notes["llama2-7b q8_0"].startswith("left out: no time left")
    left = device_report.DEADLINE - sum(device_report.BEFORE.values())
    assert left - device_report.GOLDEN - device_report.CHECKS >= device_report.MEASURE
    assert report.ends["golden"] + device_report.CHECKS <= 1000 + device_report.DEADLINE


def test_no_time_is_put_aside_for_checks_that_were_done(slow):
    first = slow(device_report.DEADLINE)
    done = [s for s in first.stages if s.name in [*device_report.CHECKED, "golden"]]
    assert len(done) == 6
    start = device_report.time.now
    again = slow(device_report.DEADLINE, done)
    assert "golden" not in again.ends
    end = start + device_report.DEADLINE
    assert end - device_report.CHECKS < max(again.ends.values()) <= end


def test_what_needs_no_build_of_ours_is_measured_where_it_failed(slow, monkeypatch):
    monkeypatch.setattr(device_report, "build", lambda *_: False)
    names = [stage.name for stage in slow(device_report.DEADLINE).stages]
    assert names == [
        "device",
        "ceilings",
        "opt-6.7b f16 transformers in 8 GiB",
        "opt-13b f16 transformers in 14 GiB",
        "llama2-7b f16 transformers",
        "opt-6.7b f16 transformers",
    ]


def test_a_large_model_is_left_out_where_a_small_one_has_time(slow):
    assert device_report.model_bytes("opt-13b", "f16") == pytest.approx(25.7e9, rel=0.01)
    assert device_report.model_bytes("llama2-7b", "q4_0") == pytest.approx(3.8e9, rel=0.01)
    sizes = [device_report.model_bytes("llama2-70b", "f16", n) for n in (2, 6)]
    assert sizes[1] - sizes[0] == pytest.approx(4 * 1.71e9, rel=0.01)
    report = slow(10_000)
    report.deadline = device_report.time.now + report.reserve + 35
    assert device_report.no_time_for(report, "large", int(25.7e9))
    assert report.stages[-1].note == "left out: no time left (35 s; it takes 49)"
    assert not device_report.no_time_for(report, "small", int(3.8e9))


def test_with_and_without_a_limit_the_same_prompt_is_read(slow):
    commands = slow(10_000).commands
    for name, limit in device_targets.LIMITED:
        prompts = [
            commands[run][commands[run].index("--prompt") + 1]
            for run in (name, f"{name} in {limit:g} GiB", f"{name} transformers in {limit:g} GiB")
        ]
        assert prompts == ["64"] * 3
    for name, depths in device_paper.SCALED.items():
        for n in depths:
            assert commands[f"make {name}, {n} layers"][-2:] == ["--layers", str(n)]
            assert f"{name}, {n} layers" in commands


def ended(pid: int) -> bool:
    """Whether a process ends within five seconds."""
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def report(tmp_path) -> Report:
    return Report(tmp_path, tmp_path, 60)


def test_a_stage_has_its_own_limit_and_the_next_one_runs(report):
    slow = report.run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 6)
    assert not slow.ok and slow.note.startswith("not done after 6 s; ")
    assert "KeyboardInterrupt" in slow.note  # it had a moment to say where it was
    failed = report.run(
        "failed", [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"], 30
    )
    assert (failed.ok, failed.note) == (False, "exit status 3; why")
    lines = "print('log'); print('{\"a\": 1}'); print('{\"a\": 2}')"
    both = report.run("lines", [sys.executable, "-c", lines], 30, rows=True)
    assert both.data == {"rows": [{"a": 1}, {"a": 2}]}
    assert [s.name for s in report.stages] == ["slow", "failed", "lines"]
    braces = report.run("braces", [sys.executable, "-c", "print('{not json'); print('{}')"], 30)
    assert (braces.ok, braces.data) == (True, {})


def test_what_was_measured_before_a_command_failed_is_kept(report, tmp_path):
    said = 'print(\'{"a": 1, "b": 1}\', flush=True); print(\'{"b": 2}\', flush=True); '
    for name, end in {
        "crash": "raise ValueError('odd')",
        "hang": "import time; time.sleep(60)",
    }.items():
        stage = report.run(name, [sys.executable, "-c", said + end], 6)
        assert not stage.ok
        assert stage.data == {"a": 1, "b": 2}
        assert "{" not in stage.note  # figures are no explanation
    assert "ValueError: odd" in report.stages[0].note
    first, second = json.loads((tmp_path / "report.json").read_text())
    assert first["data"] == second["data"] == {"a": 1, "b": 2}


def test_complaints_of_a_compiler_are_in_the_note(report):
    words = ["x.cpp:3:1: error: expected ';'", "ninja: stopped", *"abcd"]
    stage = report.run("build", [sys.executable, "-c", f"print('\\n'.join({words})); exit(1)"], 30)
    assert stage.note == "exit status 1; x.cpp:3:1: error: expected ';' | b | c | d"


def test_what_a_report_has_is_not_done_again(report, tmp_path):
    figures = [sys.executable, "-c", "print('{\"a\": 1}')"]
    report.run("figures", figures, 30)
    report.run("make model", [sys.executable, "-c", ""], 30)
    report.run("tests, kernels", [sys.executable, "-c", ""], 30)
    report.run("tests, engine", [sys.executable, "-c", "exit(1)"], 30)
    report.run("broken", [*figures[:2], figures[2] + "; exit(1)"], 30)
    log = (tmp_path / "report.log").read_text()
    kept = device_report.kept_stages(tmp_path)
    assert [s.name for s in kept] == ["figures", "tests, kernels"]
    again = Report(tmp_path, tmp_path, 60, kept)
    assert again.run("figures", ["no such command"], 30).data == {"a": 1}
    assert again.has("figures", "tests, kernels") and not again.has("figures", "broken")
    assert again.run("broken", figures, 30).ok
    assert device_report.can_run(again, "tests, kernels", "no_such_module")
    names = [stage["name"] for stage in json.loads((tmp_path / "report.json").read_text())]
    assert names == ["figures", "tests, kernels", "broken"]
    assert (tmp_path / "report.log").read_text().startswith(log)
    assert device_report.kept_stages(tmp_path / "nothing") == []


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Writes a shell script of that name; PATH has these alone and what shells need."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(device_report, "TOOLKIT", tmp_path / "toolkit")

    def program(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o700)

    return program


@pytest.mark.skipif(HAS_DEVICE, reason="there is a device here")
@pytest.mark.parametrize(
    "says, architecture",
    [("NVIDIA X, 580.1, 143771 MiB, 9.0", "90-real"), ("an old driver", "native"), ("", "")],
)
def test_the_library_is_built_for_the_device_that_is_there(tmp_path, programs, says, architecture):
    programs("nvidia-smi", f"echo '{says}'" if says else "exit 9")
    assert device_report.find_device(Report(tmp_path, tmp_path, 60)) == architecture


def test_a_build_that_cannot_be_says_what_it_lacks(tmp_path, programs, monkeypatch):
    report = Report(tmp_path, tmp_path, 60)
    monkeypatch.setattr(report, "lacks", lambda *modules: "")
    monkeypatch.setattr(report, "execute", lambda *_: ("", True, ""))
    monkeypatch.setattr(device_report.shutil, "which", lambda name, path=None: None)
    assert not device_report.build(report, None, "90")
    toolkit = tmp_path / "toolkit" / "bin"
    assert report.stages[-1].note == f"left out: no nvcc on PATH or in {toolkit}"
    monkeypatch.setattr(device_report.shutil, "which", lambda name, path=None: path and "there")
    assert device_report.build(report, None, "90")
    monkeypatch.setattr(report, "lacks", lambda *modules: f"left out: needs {', '.join(modules)}")
    assert not device_report.build(report, None, "90")
    assert report.stages[-1].note == "left out: needs pip, scikit_build_core, nanobind"


def test_a_toolkit_that_is_not_on_path_is_found(tmp_path, programs):
    for folder, file in (("bin", "nvcc"), ("lib64", "libcublas.so.13")):
        (tmp_path / "toolkit" / folder).mkdir(parents=True)
        (tmp_path / "toolkit" / folder / file).touch(mode=0o700)
    report = Report(tmp_path, tmp_path, 60)
    assert report.env["PATH"].endswith(str(tmp_path / "toolkit" / "bin"))
    if device_report.find_cublas() == tmp_path / "toolkit" / "lib64" / "libcublas.so.13":
        return
    assert importlib.util.find_spec("nvidia") is not None  # a wheel has it here


def test_ended_from_outside_it_ends_its_child(tmp_path, programs):
    programs("nvidia-smi", f"echo $$ > {tmp_path / 'pid'}; exec sleep 60")
    command = [sys.executable, str(TOOL), "--out", str(tmp_path / "out"), "--work", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(200):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.05)
    time.sleep(0.5)  # until it waits for its child
    process.terminate()
    assert process.wait(10) == 1
    assert process.stderr.read() == "ended from outside\n"
    assert ended(int((tmp_path / "pid").read_text()))


def test_one_log_has_what_all_commands_said(report, tmp_path):
    for word in ("first", "second"):
        report.run(word, [sys.executable, "-c", f"print('{word} said')"], 30)
    log = (tmp_path / "report.log").read_text()
    assert log.index("first said") < log.index("==== second") < log.rindex("second said")
    names = ["report.json", "report.log", "report.md"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert "| second | ok |" in (tmp_path / "report.md").read_text()


def test_commands_side_by_side_take_the_time_of_one(report):
    wait = [sys.executable, "-c", "import time; time.sleep(2); print('{\"a\": 1}')"]
    start = time.monotonic()
    report.together([(name, wait) for name in "abc"])
    assert time.monotonic() - start < 5
    assert sorted(s.name for s in report.stages if s.data == {"a": 1}) == ["a", "b", "c"]


def test_models_are_written_to_memory_where_it_has_room(tmp_path, monkeypatch):
    room = {"free": device_report.LARGEST_MODEL}
    monkeypatch.setattr(device_report.shutil, "disk_usage", lambda _: Namespace(**room))
    assert device_report.model_folder(tmp_path) == tmp_path
    room["free"] += 1
    folder = device_report.model_folder(tmp_path)
    folder.rmdir()
    assert folder.parent == Path("/dev/shm")


def test_children_of_a_stage_that_is_out_of_time_end_with_it(report, tmp_path):
    child = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = report.run("parent", [sys.executable, "-c", parent], 6, cwd=tmp_path)
    assert done.note.startswith("not done after 6 s") and done.seconds < 10
    assert ended(int((tmp_path / "pid").read_text()))


def test_what_a_stage_lacks_is_said_first(report):
    assert not device_report.can_run(report, "tests", "no_such_module")
    assert report.stages[-1].note.startswith("left out: needs no_such_module: give their wheels")


def test_parts_of_a_model_are_joined_in_order(report, tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    for part in parts:
        part.write_bytes(part.name.encode() * 3)
    assert joined(report, parts).read_bytes() == b"aaabbb"
    assert joined(report, parts[:1]) == parts[0]
    assert joined(report, [*parts, tmp_path / "missing"]) is None
    assert "missing" in report.stages[-1].note


def test_a_model_of_ours_gives_every_figure_that_the_targets_ask_for(tmp_path, monkeypatch):
    """The measuring itself, with the CUDA backend on the host."""
    try:
        library = host_library()
    except NoCompiler as error:
        pytest.skip(str(error))
    model = tmp_path / "model.gguf"
    make_tiny_model(model, "opt", "F32", n_layer=6, n_ff=2048)
    monkeypatch.setenv("COREINFER_CUDA_LIBRARY", str(library))
    tool = TOOL.with_name("device_bench.py")
    command = [sys.executable, str(tool), "ours", "--model", str(model), "--beta", "0.2"]
    command += ["--prompt", "4", "--gen", "1", "--n-ctx", "32"]

    def figures(*options: str) -> dict:
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return dict(ChainMap(*reversed([json.loads(line) for line in done.stdout.splitlines()])))

    free = figures()
    resident = _core.Engine(str(model), n_gpu_layers=-1, vram_limit=1 << 30)
    own = (1 << 30) - resident.backend["device_memory"]
    limit = (own + free["weight_bytes"]) / 2**30  # the context and the core come beside these
    data = {
        "ceilings": {"copy_bytes_s": 1e9, "f16_flop_s": 1e9, "host_to_device_bytes_s": 1e9},
        "llama2-7b f16": free,
        "opt-6.7b f16": free,
        "opt-6.7b f16 in 8 GiB": figures("--vram-limit", str(limit)),
        "opt-6.7b f16 transformers in 8 GiB": {"seconds_a_token": 1.0},
    }
    assert free["ffn_resident"] and not data["opt-6.7b f16 in 8 GiB"]["ffn_resident"]
    assert data["opt-6.7b f16 in 8 GiB"]["peak_device_bytes"] < limit * 2**30
    for what, _, found in device_targets.rows(data):
        of_these = ("7B f16" in what and "0.4" not in what and "llama.cpp" not in what) or (
            "opt-6.7b" in what
        )
        assert (found == "not measured") != of_these, what


def core(beta: float, seconds: float, **more: float) -> dict:
    return {"beta": beta, "seconds_a_token": seconds, "bytes_a_token": 5e9} | more


def test_figures_become_the_ratios_of_the_targets():
    data = {
        "ceilings": {"copy_bytes_s": 2e12, "f16_flop_s": 5e14, "host_to_device_bytes_s": 5e10},
        "llama2-7b f16": {
            "dense_bytes_a_token": 1e10,
            "dense_seconds_a_token": 0.008,
            "prompt": 500,
            "prefill_seconds": 0.02,
            "prefill_flock_seconds": 0.021,
            "core": [
                core(
                    0.2,
                    0.005,
                    compact_bytes=0.5e9,
                    compact_source_bytes=1.5e9,
                    select_seconds=0.001,
                    compact_seconds=0.002,
                )
            ],
        },
        "llama2-7b f16 llama-bench": {
            "rows": [{"n_gen": 0, "avg_ts": 9e9}, {"n_gen": 64, "avg_ts": 100.0}]
        },
        "opt-6.7b f16": {"prompt": 64, "core": [core(0.2, 0.004)]},
        "opt-6.7b f16 in 8 GiB": {
            "prompt": 64,
            "core": [core(0.2, 0.005, time_to_first_token=0.3)],
            "peak_device_bytes": 6 * 2**30,
            "ffn_bytes": 1e10,
        },
        "opt-6.7b f16 transformers in 8 GiB": {"seconds_a_token": 0.25},
    }
    found = {what: text for what, _, text in device_targets.rows(data)}
    assert found["dense decode, 7B f16, share of copy bandwidth"] == "0.625"
    assert found["core decode ÷ dense, 7B f16, β = 0.2, of the byte ratio"] == "0.8"
    assert found["dense decode ÷ llama.cpp, 7B f16"] == "1.25"
    assert found["prefill, 7B f16, 512 tokens, share of the product rate"] == "0.487"
    assert found["counting (flock), share of prefill, 7B f16"] == "0.05"
    assert found["select + compact, 7B f16, β = 0.2, over bytes moved ÷ bandwidth"] == "3"
    opt = "opt-6.7b f16, β = 0.2, 8 GiB: "
    assert found[opt + "decode ÷ Transformers + accelerate"] == "50"
    assert found[opt + "decode ÷ without a limit"] == "0.8"
    assert found[opt + "peak of allocations ÷ limit"] == "0.75"
    assert found[opt + "first token ÷ (streamed bytes ÷ host-to-device rate)"] == "1.5"
    for what in (
        "dense decode, 7B q4_k, share of copy bandwidth",
        "dense decode ÷ llama.cpp, 7B q8_0",
    ):
        assert found[what] == "not measured"
    assert found["core decode ÷ dense, 7B f16, β = 0.4, of the byte ratio"] == "not measured"


def test_two_depths_give_the_full_one_and_stand_beside_the_papers_figures():
    def at(n: int) -> dict:
        fast = {"beta": 0.2, "seconds_a_token": 0.001 + 0.0006 * n, "bytes_a_token": 1e9 + 5e8 * n}
        return {
            "dense_seconds_a_token": 0.001 + 0.002 * n,
            "dense_bytes_a_token": 1e9 * n,
            "weight_bytes": 1e9 + 1.7e9 * n,
            "core": [fast],
        }

    name = "llama2-70b f16"
    data = {device_paper.at_depth(name, n): at(n) for n in device_paper.SCALED[name]}
    full = device_paper.scaled(data, name)
    expected = at(PAPER["llama2-70b"].n_layer)
    assert full["dense_seconds_a_token"] == pytest.approx(expected["dense_seconds_a_token"])
    assert full["core"][0] == pytest.approx(expected["core"][0])
    found = {what: (paper, here) for what, paper, here in device_paper.rows(data)}
    paper, here = found["A100, Llama-2-70B: CoreInfer"]
    assert paper.startswith("17.2 tok/s, 5.5×") and here.startswith("20.4 tok/s, 3.3× own dense")
    assert "extrapolated" in here
    assert found["A100, OPT-66B: CoreInfer"][1] == "not measured"
    text = device_report.table([device_report.Stage(n, True, 1.0, data=d) for n, d in data.items()])
    assert f"| {name}, extrapolated from 2 and 6 layers | core 0.2 | 20.4 |" in text
    for figure in ("1.92", "2.73", "9.62", "1.85", "7.32", "9.26", "15.96", "3.36", "19.83"):
        assert figure in text
    for figure in ("7.28", "57.2", "17.2", "5.5×", "2.3×", "59 GB", "78 GB", "44 GB"):
        assert figure in text
