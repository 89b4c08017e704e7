"""Everything that needs a GPU, in one command from a bare checkout: builds, tests, makes models of
the paper's sizes, measures ours and the peers that are there, looks for memory errors and races.

    python tools/device_report.py --out report [--wheels DIR] [--llama-bench FILE]
        [--model PART PART --golden FILE]

Needs Python, nvcc, CMake, nanobind and scikit-build-core, PyTorch for the limits of the device, and
Transformers with accelerate for the peer; the tests also pytest and gguf. What is not there of
these may lie in --wheels, with what it needs in turn; no network. --model names a real model's
file, or the parts of one that are joined in order, and --golden the float32 reference that its
decoding is held against. Each stage has a time limit and reports its failure, and the next one
runs; what would not end in time is left out and said so. Writes, with every stage, OUT/report.json
and OUT/report.md, and OUT/report.log, what all commands said. Without a GPU it says so and ends.

Written without a GPU at hand: it has not run to its end yet.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import device_paper
import device_targets

ROOT = Path(__file__).resolve().parent.parent
SITE = "device-site"  # under the work folder: what is installed for the report
# Seconds that a stage may take at most. With MEASURE, which may have more where others took less,
# they are below the deadline: what comes last is reached whatever the stages before it do.
BEFORE = {"device": 20, "wheels": 20, "build": 130, "ceilings": 50, "smoke test": 40}
MEASURE = 60
GOLDEN = 25
CHECKS = 90  # of all tests and sanitizers, side by side
DEADLINE = 460  # the command ends a few seconds later at most
SMALL = "tests/test_cuda_small.py"  # a case of every family of kernels
TESTS = [f"tests/test_cuda_{what}.py" for what in ("kernels", "engine", "sessions")]
# What says most for its time first: the peer under a limit, a minute for OPT-13B, after the types.
MODELS = [
    ("llama2-7b", "f16", 0.0),
    ("opt-6.7b", "f16", 8.0),  # GiB
    ("llama2-7b", "q4_0", 0.0),
    ("llama2-7b", "q8_0", 0.0),
    ("llama2-7b", "q4_k", 0.0),
    ("opt-13b", "f16", 14.0),
]
LARGEST_MODEL = 26 << 30


@dataclass
class Stage:
    """What became of one step."""

    name: str
    ok: bool
    seconds: float
    note: str = ""  # why it failed or was left out, or the end of its output
    data: dict[str, Any] = field(default_factory=dict)


def find_cublas() -> Path | None:
    """cuBLAS as PyTorch's wheels brought it: not beside what this report installs elsewhere."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for pattern in ("cu13/lib/libcublas.so.*", "cublas/lib/libcublas.so.*"):
            found = sorted(Path(folder).glob(pattern))
            if found:
                return found[0]
    return None


def model_folder(work: Path) -> Path:
    """Where models are written: in memory if it has room, for a disk may take minutes."""
    memory = Path("/dev/shm")
    try:
        if shutil.disk_usage(memory).free > LARGEST_MODEL:
            return Path(tempfile.mkdtemp(prefix="coreinfer-device-", dir=memory))
    except OSError:
        pass
    return work


class Report:
    """Runs commands within one deadline and keeps what they said."""

    def __init__(self, out: Path, work: Path, seconds: float) -> None:
        self.out, self.work = out, work
        self.models = work  # where models are written
        self.lock = threading.Lock()
        self.deadline = time.monotonic() + seconds
        self.stages: list[Stage] = []
        site = str(work / SITE)
        self.reserve = 0.0  # seconds that stages to come have first claim on
        self.env = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0))),
            "COREINFER_TEST_TARGETS": "device",
        }
        (out / "report.log").write_text("")
        cublas = find_cublas()
        if cublas is not None:
            self.env.setdefault("COREINFER_CUBLAS_LIBRARY", str(cublas))
        paths = [site, self.env.get("PYTHONPATH", "")]
        self.env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)

    def left(self) -> float:
        return self.deadline - self.reserve - time.monotonic()

    def lacks(self, *modules: str) -> str:
        """Why a stage that imports these modules cannot run; empty where it can."""
        site = self.work / SITE
        missing = [
            m for m in modules if not (site / m).exists() and importlib.util.find_spec(m) is None
        ]
        wheels = "give their wheels with --wheels DIR"
        return f"left out: needs {', '.join(missing)}: {wheels}" if missing else ""

    def execute(self, command: list[str], limit: float, cwd: Path) -> tuple[str, bool, str]:
        """(output, whether it ended well, why not); after `limit` seconds its children end, too.

        They are interrupted first, so that tests say what failed up to there.
        """
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            return "", False, str(error)
        note = ""
        try:
            text, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            text = ""
            for number in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                try:
                    text, _ = process.communicate(timeout=3)
                    break
                except subprocess.TimeoutExpired:  # or a child in a session of its own has the pipe
                    continue
            with contextlib.suppress(ProcessLookupError):  # what does not heed an interrupt
                os.killpg(process.pid, signal.SIGKILL)
            note = f"not done after {limit:.0f} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if not note and process.returncode != 0:
            note = f"exit status {process.returncode}"
        return text, not note, note

    def run(self, name: str, command: list[str], limit: float, cwd: Path = ROOT) -> Stage:
        """Runs a command for at most `limit` seconds; lines of JSON in its output are its data."""
        limit = min(limit, self.left())
        start = time.monotonic()
        if limit < 5:
            return self.add(Stage(name, False, 0.0, "left out: no time left"))
        text, ok, note = self.execute(command, limit, cwd)
        with self.lock, open(self.out / "report.log", "a") as log:
            log.write(f"==== {name}: {' '.join(command)}\n{text}\n")
        lines = text.strip().splitlines()
        stage = Stage(name, ok, time.monotonic() - start, note)
        found = list(filter(None, map(json_object, lines))) if ok else []
        if found:
            stage.data = found[0] if len(found) == 1 else {"rows": found}
        else:
            stage.note = "; ".join(s for s in [note, " | ".join(lines[-3:])[-600:]] if s)
        return self.add(stage)

    def together(self, jobs: Sequence[tuple[str, list[str]]]) -> None:
        """Runs commands side by side with all the time that is left; nothing is measured there."""
        with ThreadPoolExecutor(max(1, len(jobs))) as pool:
            list(pool.map(lambda job: self.run(*job, self.left()), jobs))

    def add(self, stage: Stage) -> Stage:
        with self.lock:
            self.stages.append(stage)
            mark = "ok" if stage.ok else "FAILED"
            print(f"{stage.name}: {mark}, {stage.seconds:.1f} s {stage.note}", flush=True)
            self.write()
        return stage

    def write(self) -> None:
        """The report as far as it is known: whatever ends this process, it is there."""
        stages = list(map(asdict, self.stages))
        (self.out / "report.json").write_text(json.dumps(stages, indent=1))
        (self.out / "report.md").write_text(table(self.stages))


def json_object(line: str) -> dict[str, Any] | None:
    """The object that a line of output is; None for other text, brace or not."""
    if not line.startswith("{"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def find_device(report: Report) -> bool:
    """Whether there is a GPU, by its driver's own word."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return report.run("device", query, BEFORE["device"]).ok


def joined(report: Report, parts: list[Path]) -> Path | None:
    """The model's file, its parts joined in the work folder where there are several."""
    if len(parts) == 1:
        return parts[0]
    start = time.monotonic()
    path = report.models / "joined.gguf"
    try:
        with open(path, "wb") as out:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, out)
    except OSError as error:
        report.add(Stage("join model", False, time.monotonic() - start, str(error)))
        return None
    return path


def build(report: Report, wheels: Path | None) -> bool:
    """Installs the package with CUDA for this device into a folder of its own."""
    site = report.work / SITE
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    if wheels is not None:
        files = map(str, sorted(wheels.glob("*.whl")))
        report.run("wheels", [*pip, str(site), *files], BEFORE["wheels"])
    command = [*pip, str(site), "--upgrade", "--no-build-isolation", str(ROOT)]
    command += ["-Ccmake.define.COREINFER_CUDA=ON"]
    command += ["-Ccmake.define.COREINFER_CUDA_ARCHITECTURES=native"]
    command += [f"-Cbuild-dir={report.work / 'build'}"]
    return report.run("build", command, BEFORE["build"]).ok


PYTEST = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]


def can_run(report: Report, name: str, *modules: str) -> bool:
    """Whether a stage has the modules that it imports; reports it where not."""
    why = report.lacks(*modules)
    if why:
        report.add(Stage(name, False, 0.0, why))
    return not why


def check(report: Report) -> None:
    """All CUDA tests on the device, and the small ones under compute-sanitizer, side by side."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    jobs = []
    for file in TESTS:
        name = f"tests, {Path(file).stem.rpartition('_')[2]}"
        if can_run(report, name, "pytest", "gguf"):
            jobs.append((name, [*PYTEST, file]))
    for tool in ("memcheck", "racecheck"):
        name = f"sanitizer {tool}"
        command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", "--target-processes=all"]
        if can_run(report, name, "pytest"):
            jobs.append((name, [*command, *PYTEST, SMALL]))
    report.together(jobs)


def bench(report: Report, what: str, name: str, limit: float, **options: Any) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tools" / "device_bench.py"), what]
    for key, value in options.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    return report.run(name, command, limit).data


def make_model(report: Report, shape: str, dtype: str, layers: int = 0) -> Path | None:
    path = report.models / f"{shape}-{dtype}-{layers}.gguf"
    command = [sys.executable, "tools/make_synthetic_model.py", "--shape", shape]
    command += ["--type", dtype, "--out", str(path)]
    name = f"make {shape} {dtype}"
    if layers:
        name = device_paper.at_depth(name, layers)
        command += ["--layers", str(layers)]
    if report.run(name, command, 90).ok:
        return path
    path.unlink(missing_ok=True)
    return None


def no_time_for(report: Report, name: str) -> bool:
    """Whether a model is left out, since the first of its stages would not come far."""
    short = report.left() < 30
    if short:
        report.add(Stage(name, False, 0.0, "left out: no time left"))
    return short


def peer(report: Report, shape: str, name: str, limit: float, **options: Any) -> None:
    """The same shape in Transformers, under a limit with accelerate."""
    more = ["accelerate"] if "vram_limit" in options else []
    if can_run(report, name, "torch", "transformers", *more):
        bench(report, "transformers", name, limit, shape=shape, **options)


def measure(report: Report, llama_bench: Path | None) -> None:
    """The models one after the other, each deleted before the next is made; the targets' first.

    With and without a limit a model reads the same prompt: it is the same core set that decodes.
    """
    for shape, dtype, limit in MODELS:
        name = f"{shape} {dtype}"
        if no_time_for(report, name):
            continue
        path = make_model(report, shape, dtype)
        if path is None:
            continue
        prompt = 64 if limit else 512
        bench(report, "ours", name, 90, model=path, beta="0.2,0.4", prompt=prompt)
        if limit:
            options = {"model": path, "beta": "0.2", "prompt": prompt, "vram_limit": limit}
            bench(report, "ours", f"{name} in {limit:g} GiB", 90, **options)
        elif llama_bench is not None:
            command = [str(llama_bench), "-m", str(path), "-ngl", "99", "-o", "jsonl", "-r", "3"]
            report.run(f"{name} llama-bench", [*command, "-p", "512", "-n", "64"], 90)
        path.unlink(missing_ok=True)
        if limit:
            options = {"prompt": prompt, "gen": 4, "vram_limit": limit}
            peer(report, shape, f"{name} transformers in {limit:g} GiB", 90, **options)
    for name, depths in device_paper.SCALED.items():
        for layers in depths:
            run = device_paper.at_depth(name, layers)
            if no_time_for(report, run):
                continue
            path = make_model(report, *name.split(), layers)
            if path is not None:
                bench(report, "ours", run, 60, model=path, beta="0.2", prompt=64)
                path.unlink(missing_ok=True)
    for shape, prompt in (("llama2-7b", 512), ("opt-6.7b", 64)):
        name = f"{shape} f16 transformers"
        if not no_time_for(report, name):
            peer(report, shape, name, 60, prompt=prompt, gen=32)


def table(stages: list[Stage]) -> str:
    """The stages and the measured figures as Markdown."""
    data = {s.name: s.data for s in stages}
    for name, (few, more) in device_paper.SCALED.items():
        with contextlib.suppress(KeyError, StopIteration):
            full = device_paper.scaled(data, name)
            data[f"{name}, extrapolated from {few} and {more} layers"] = full
    limits = data.get("ceilings", {})
    lines = [f"# {limits.get('device', 'unknown device')}", ""]
    copy, flop = limits.get("copy_bytes_s"), limits.get("f16_flop_s")
    if copy and flop:
        lines += [
            f"Copy {copy / 1e9:.0f} GB/s (read + written), float16 product {flop / 1e12:.0f} "
            f"TFLOP/s, host to device {limits['host_to_device_bytes_s'] / 1e9:.1f} GB/s.",
            "",
        ]
    lines += ["| model | decode | tok/s | GB/s | of copy | prefill tok/s | first token s |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]

    def row(name: str, what: str, seconds: float, size: float, pp: str, first: str) -> str:
        rate = size / seconds
        share = f"{rate / copy:.2f}" if copy and size else ""
        bandwidth = f"{rate / 1e9:.0f}" if size else ""
        return f"| {name} | {what} | {1 / seconds:.1f} | {bandwidth} | {share} | {pp} | {first} |"

    for name, d in data.items():
        if "dense_seconds_a_token" in d:
            pp = f"{d['prompt'] / d['prefill_seconds']:.0f}" if "prefill_seconds" in d else ""
            seconds, size = d["dense_seconds_a_token"], d["dense_bytes_a_token"]
            lines.append(row(name, "dense", seconds, size, pp, ""))
        for c in d.get("core", []):
            first = f"{c['time_to_first_token']:.2f}" if "time_to_first_token" in c else ""
            what = f"core {c['beta']:g}"
            lines.append(row(name, what, c["seconds_a_token"], c["bytes_a_token"], "", first))
        if "transformers" in name and "seconds_a_token" in d:
            first = f"{d['time_to_first_token']:.2f}"
            lines.append(row(name, "dense", d["seconds_a_token"], 0.0, "", first))
    lines += ["", "| the paper's, input of about 64 tokens | paper | here |", "| --- | --- | --- |"]
    lines += [f"| {what} | {paper} | {here} |" for what, paper, here in device_paper.rows(data)]
    lines += ["", "| target | wanted | found |", "| --- | --- | --- |"]
    lines += [
        f"| {what} | {wanted} | {found} |" for what, wanted, found in device_targets.rows(data)
    ]
    lines += ["", "| stage | result | seconds | note |", "| --- | --- | --- | --- |"]
    for s in stages:
        note = s.note.replace("|", "/").replace("\n", " ")[:200]
        lines.append(f"| {s.name} | {'ok' if s.ok else 'failed'} | {s.seconds:.1f} | {note} |")
    return "\n".join(lines) + "\n"


def everything(report: Report, args: argparse.Namespace) -> bool:
    """All stages in order, what says most first; False where there is no device."""
    if not find_device(report):
        return False
    if not build(report, args.wheels.resolve() if args.wheels else None):
        return True
    bench(report, "ceilings", "ceilings", BEFORE["ceilings"])
    if can_run(report, "smoke test", "pytest"):
        report.run("smoke test", [*PYTEST, SMALL], BEFORE["smoke test"])
    report.models = model_folder(report.work)
    try:
        report.reserve = float(GOLDEN + CHECKS)
        measure(report, args.llama_bench.resolve() if args.llama_bench else None)
        report.reserve = float(CHECKS)
        if args.model and args.golden:
            model = joined(report, [part.resolve() for part in args.model])
            if model is not None:
                options = {"model": model, "golden": args.golden.resolve()}
                bench(report, "golden", "golden", GOLDEN, **options)
    finally:
        if report.models != report.work:
            shutil.rmtree(report.models, ignore_errors=True)
    report.reserve = 0.0
    check(report)
    return True


def main() -> int:
    """Runs all stages; the exit status is 0 when none failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the report and its logs")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "coreinfer-device"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first (gguf)")
    parser.add_argument(
        "--model", type=Path, nargs="*", default=[], help="a real GGUF file, or its parts in order"
    )
    parser.add_argument("--golden", type=Path, help="golden file of that model")
    parser.add_argument("--llama-bench", type=Path, help="a llama-bench built with CUDA")
    parser.add_argument(
        "--seconds", type=float, default=DEADLINE, help="deadline (default: %(default)s)"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    report = Report(args.out.resolve(), args.work.resolve(), args.seconds)
    if not everything(report, args):
        print("no NVIDIA GPU that its driver can see: nothing was measured")
    print((report.out / "report.md").read_text())
    return 0 if all(s.ok for s in report.stages) else 1


if __name__ == "__main__":
    sys.exit(main())
