"""The house keeps its direction: includes and imports follow the declared dependencies."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)


def declared_dependencies() -> dict[str, set[str]]:
    """Folder -> every folder it may know, from coreinfer_library(folder DEPS ...), transitively."""
    text = (ROOT / "CMakeLists.txt").read_text()
    direct = {}
    for match in re.finditer(
        r"^coreinfer_library\((\w+)(?:\s+DEPS ([\w ]+))?\)", text, re.MULTILINE
    ):
        direct[match[1]] = set((match[2] or "").split())

    def closure(folder: str) -> set[str]:
        found = set(direct[folder])
        for dep in direct[folder]:
            found |= closure(dep)
        return found

    return {folder: closure(folder) for folder in direct}


def test_every_folder_of_the_core_is_declared():
    folders = {p.name for p in (ROOT / "cpp").iterdir() if p.is_dir() and any(p.iterdir())}
    assert folders - set(declared_dependencies()) <= {"bench"}


@pytest.mark.parametrize("folder", sorted(declared_dependencies()))
def test_includes_follow_the_declared_dependencies(folder):
    allowed = declared_dependencies()[folder] | {folder}
    wrong = []
    for source in sorted((ROOT / "cpp" / folder).rglob("*")):
        if source.suffix not in {".h", ".cpp", ".inc"}:
            continue
        for include in INCLUDE.findall(source.read_text()):
            if include.split("/")[0] not in allowed:
                wrong.append(f"{source.relative_to(ROOT)} includes {include}")
    assert not wrong


def test_siblings_do_not_know_each_other():
    deps = declared_dependencies()
    assert "kernels" not in deps["gguf"] and "gguf" not in deps["kernels"]
    assert "model" not in deps["backend"]


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level > 0 and node.module:
                names.add(node.module.split(".")[0])
            elif node.level > 0:
                names |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("coreinfer."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("coreinfer."):
                    names.add(alias.name.split(".")[1])
    return names


def test_nothing_below_the_command_line_imports_it():
    package = ROOT / "python" / "coreinfer"
    wrong = []
    for path in sorted(package.rglob("*.py")):
        if "cli" in path.relative_to(package).parts or path.name == "__main__.py":
            continue
        if "cli" in imported_modules(path):
            wrong.append(path.name)
    assert not wrong


def test_tokenizer_and_chat_do_not_need_the_extension():
    package = ROOT / "python" / "coreinfer"
    for name in ("tokenizer.py", "chat.py", "config.py"):
        assert not imported_modules(package / name) & {"_core", "llama"}, name
