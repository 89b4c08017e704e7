"""The commands of README.md and tools/FIGURES.md are commands: their programs are there and know
every flag. The pages' links lead somewhere.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from coreinfer.bench import binary_path

ROOT = Path(__file__).resolve().parent.parent
OURS = r"(?:python tools/\w+\.py|coreinfer-bench|coreinfer [a-z]+)\b"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
FLAG = re.compile(r"(?<![^\s\[])--?[a-zA-Z][\w-]*")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "tools/FIGURES.md")
}


def lines_of(script: str) -> list[str]:
    """A shell script's commands, without comments."""
    joined = re.sub(r"\\\n\s*", "", script)
    return [part.strip() for part in re.split(r"\n|&&", re.sub(r"\s#.*", "", joined))]


def code_of(page: str) -> list[str]:
    """What stands in a page's shell blocks, command by command, and in its code spans."""
    blocks = [line for kind, text in BLOCK.findall(page) if kind == "sh" for line in lines_of(text)]
    return blocks + INLINE.findall(" ".join(BLOCK.sub("", page).split()))


CODE = [(name, code) for name, page in PAGES.items() for code in code_of(page)]
COMMANDS = sorted({pair for pair in CODE if re.match(OURS, pair[1])})
# Flags that a sentence names alone.
ALONE = sorted({pair for pair in CODE if pair[1].startswith("--")})


@cache
def help_of(*program: str) -> str:
    paths = [str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "500"}
    done = subprocess.run(
        [*program, "--help"], capture_output=True, text=True, env=env, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def program_of(command: str) -> tuple[str, ...]:
    words = command.split()
    if words[0] == "python":
        return sys.executable, words[1]
    if words[0] == "coreinfer-bench":
        return (str(binary_path()),)
    actions = 2 if words[1] == "cluster" and len(words) > 2 else 1
    return sys.executable, "-m", "coreinfer", *words[1 : 1 + actions]


def flags_of(command: str) -> set[str]:
    """The flags that the command's program knows."""
    return set(FLAG.findall(re.sub(r"[,=|\]]", " ", help_of(*program_of(command)))))


def anchors_of(page: str) -> set[str]:
    """What GitHub calls a page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("README.md", {"run", "tune", "build", "tools/device_report.py"}),
        ("tools/FIGURES.md", {"tune", "build", "tools/measure_start.py", str(binary_path())}),
    ],
)
def test_a_page_has_commands(name, programs):
    assert programs <= {program_of(command)[-1] for page, command in COMMANDS if page == name}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_of_a_page_has_the_flags_that_it_names(page, command):
    assert set(FLAG.findall(command)) <= flags_of(command), page


@pytest.mark.parametrize(("page", "flags"), ALONE)
def test_a_flag_that_a_page_names_alone_is_one_of_its_commands(page, flags):
    known = set().union(*(flags_of(command) for name, command in COMMANDS if name == page))
    assert set(FLAG.findall(flags)) <= known


@pytest.mark.parametrize("name", PAGES)
def test_a_link_of_a_page_leads_to_a_file_and_a_heading(name):
    links = LINK.findall(PAGES[name])
    assert links
    for path, anchor in links:
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.is_file(), path
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), (path, anchor)
