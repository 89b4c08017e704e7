"""The device report without a device: it says so and ends; its arithmetic on given figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import device_targets
from device_report import Report, joined

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


@pytest.fixture
def report(tmp_path) -> Report:
    return Report(tmp_path, tmp_path, 60)


def test_a_stage_has_its_own_limit_and_the_next_one_runs(report):
    slow = report.run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 6)
    assert (slow.ok, slow.note) == (False, "not done after 6 s")
    failed = report.run(
        "failed", [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"], 30
    )
    assert (failed.ok, failed.note) == (False, "exit status 3; why")
    lines = "print('log'); print('{\"a\": 1}'); print('{\"a\": 2}')"
    both = report.run("lines", [sys.executable, "-c", lines], 30)
    assert both.data == {"rows": [{"a": 1}, {"a": 2}]}
    assert [s.name for s in report.stages] == ["slow", "failed", "lines"]


def test_parts_of_a_model_are_joined_in_order(report, tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    for part in parts:
        part.write_bytes(part.name.encode() * 3)
    assert joined(report, parts).read_bytes() == b"aaabbb"
    assert joined(report, parts[:1]) == parts[0]
    assert joined(report, [*parts, tmp_path / "missing"]) is None
    assert "missing" in report.stages[-1].note


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
                core(0.2, 0.005, compact_bytes=1e9, select_seconds=0.001, compact_seconds=0.002)
            ],
        },
        "llama2-7b f16 llama-bench": {
            "rows": [{"n_gen": 0, "avg_ts": 9e9}, {"n_gen": 64, "avg_ts": 100.0}]
        },
        "opt-6.7b f16": {"core": [core(0.2, 0.004)]},
        "opt-6.7b f16 in 8 GiB": {
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
    assert found["prefill, 7B f16, 512 tokens, share of the product rate"] == "0.5"
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
