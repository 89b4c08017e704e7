"""The Python surface of the extension is a golden file: a change of it shows in review."""

from __future__ import annotations

import pytest


def test_stub_file_is_what_the_extension_offers():
    pytest.importorskip("nanobind", reason="nanobind writes the stubs (extra: test)")
    from update_stubs import TARGET, stub_text

    assert stub_text() == TARGET.read_text(), (
        "the interface of _core changed: run python tools/update_stubs.py and review the diff"
    )


def test_package_is_marked_as_typed():
    import importlib.resources

    package = importlib.resources.files("coreinfer")
    assert package.joinpath("py.typed").is_file() and package.joinpath("_core.pyi").is_file()
