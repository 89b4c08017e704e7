"""The runtime that stands in for CUDA's (tests/cuda_host) finds what only a device would show."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cuda_host.build import NoCompiler, faults_library

# In the order of faults.cu.
FAULTS = [
    ("none", ""),
    ("no barrier between threads of two warps", "a race with a"),
    ("no __syncwarp between lanes, only a shuffle", "a race with a"),
    ("read before the wait", "a read of what a kernel before may still write"),
    ("written before the wait", "a write before the kernel has waited"),
    ("a thread that never waits", "leaves without waiting"),
    ("a float4 at an address of 4", "misaligned address"),
    ("one float over the end", "memory that is not the device's"),
    ("memory of the host in a kernel", "memory that is not the device's"),
    ("a warp operation of some lanes", "warp operation"),
    ("memory of the device in the host's code", "device memory in host code"),
]


@pytest.fixture(scope="module")
def library() -> str:
    try:
        return str(faults_library())
    except NoCompiler as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("order", ["", "backwards", "7"])
@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[name for name, _ in FAULTS])
def test_a_fault_in_a_kernel_ends_the_process(library, number, order, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_ORDER", order)
    code = f"import ctypes; print(ctypes.CDLL({library!r}).run_faulty(ctypes.c_long({number})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == (FAULTS[number][1] == ""), done.stderr
    assert FAULTS[number][1] in done.stderr
    if number == 0:
        assert done.stdout == "0\n"
