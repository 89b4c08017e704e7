"""Where the tests of the CUDA backend run: its sources on the host, and a device if there is one.

A module takes the fixture over by importing it: ``from cuda_host.target import target``.
COREINFER_TEST_TARGETS, `host`, `device` or both with a comma, says which of them run; one that was
named and cannot run is a failure, not a skip.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from coreinfer._core import testing
from cuda_host.build import NoCompiler, host_library

VARIABLE = "COREINFER_CUDA_LIBRARY"
HAS_DEVICE = Path("/dev/nvidiactl").exists()
NAMED = os.environ.get("COREINFER_TEST_TARGETS", "")
TARGETS = NAMED.split(",") if NAMED else ["host", "device"] if HAS_DEVICE else ["host"]


def _use(library: str | None) -> str | None:
    """Sets which library the core opens; returns what was set before."""
    before = os.environ.pop(VARIABLE, None)
    if library is not None:
        os.environ[VARIABLE] = library
    return before


def _cannot_run(why: str) -> None:
    if NAMED:
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module", params=TARGETS)
def target(request) -> Iterator[str]:
    """The name of the target; while it is in use, the core opens that target's library."""
    if request.param == "host":
        try:
            library = str(host_library())
        except NoCompiler as error:
            _cannot_run(str(error))
        before = _use(library)
    else:
        before = _use(None)
        try:
            testing.AnyBackend("CUDA")
        except RuntimeError as error:
            _use(before)
            _cannot_run(f"this build cannot use the CUDA device: {error}")
    yield request.param
    _use(before)
