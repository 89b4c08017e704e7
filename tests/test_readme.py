"""The README's commands are commands: their programs are there and know every flag."""

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
COMMAND = re.compile(r"`((?:python tools/\w+\.py|coreinfer-bench|coreinfer [a-z]+)\b[^`]*)`")
FLAG = re.compile(r"(?<![^\s\[])--?[a-zA-Z][\w-]*")
PAGE = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
COMMANDS = sorted(set(COMMAND.findall(PAGE)))


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


def test_the_readme_has_commands():
    programs = {program_of(command)[-1] for command in COMMANDS}
    assert {"tools/measure_fidelity.py", "tools/compare_llama_cpp.py", "tune"} <= programs


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_has_the_flags_that_it_names(command):
    known = set(FLAG.findall(re.sub(r"[,=|\]]", " ", help_of(*program_of(command)))))
    assert set(FLAG.findall(command)) <= known
