"""Writes python/coreinfer/_core.pyi from the installed extension; a test holds the two together."""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "python" / "coreinfer" / "_core.pyi"


def stub_text() -> str:
    """The stub of the installed coreinfer._core, as nanobind's stubgen writes it."""
    from nanobind.stubgen import StubGen

    from coreinfer import _core

    generator = StubGen(_core, quiet=True)
    generator.put(_core)
    return generator.get()


if __name__ == "__main__":
    TARGET.write_text(stub_text())
    print(f"wrote {TARGET.name}")
