"""Everything that needs a GPU, in one command from a bare checkout: builds, tests, makes models of
the paper's sizes, measures ours and the peers that are there, looks for memory errors and races.

    python tools/device_report.py --out report [--wheels DIR] [--llama-bench FILE]
        [--model PART PART --golden FILE] [--resume]

Needs Python, nvcc, CMake, nanobind and scikit-build-core, PyTorch for the limits of the device, and
Transformers with accelerate for the peer; the tests also pytest and gguf. What is not there of
these may lie in --wheels, with what it needs in turn; no network. --model names a real model's
file, or the parts of one that are joined in order, and --golden the float32 reference that its
decoding is held against. Each stage has a time limit and reports its failure, and the next one
runs; what would not end in time is left out and said so. Writes, with every stage, OUT/report.json
and OUT/report.md, and OUT/report.log, what all commands said. With --resume what a report in OUT
has is kept, and what it lacks is done. Without a GPU it says so and ends.

Written without a GPU at hand: it has not run to its end yet.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import ChainMap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import device_paper
import device_targets
from gguf_stream import block_size
from model_shape import tensor_specs
from synthetic_shapes import PAPER

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
TESTS = ("kernels", "engine", "sessions")  # of tests/test_cuda_*.py
SANITIZERS = ("memcheck", "racecheck")
CHECKED = [f"tests, {what}" for what in TESTS] + [f"sanitizer {tool}" for tool in SANITIZERS]
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
TOOLKIT = Path("/usr/local/cuda")


@dataclass
class Stage:
    """What became of one step."""

    name: str
    ok: bool
    seconds: float
    note: str = ""  # why it failed or was left out, or the end of its output
    data: dict[str, Any] = field(default_factory=dict)


def find_cublas() -> Path | None:
    """cuBLAS as PyTorch's wheels brought it, which is not beside what this report installs
    elsewhere, or the toolkit's, which the loader may not be told of."""
    spec = importlib.util.find_spec("nvidia")
    places = [
        Path(folder) / wheel
        for folder in (spec.submodule_search_locations or [] if spec is not None else [])
        for wheel in ("cu13/lib", "cublas/lib")
    ]
    for folder in [*places, TOOLKIT / "lib64"]:
        found = sorted(folder.glob("libcublas.so.*"))
        if found:
            return found[0]
    return None


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or where the toolkit is installed by default."""
    return shutil.which(name) or shutil.which(name, path=TOOLKIT / "bin")


def model_folder(work: Path) -> Path:
    """Where models are written: in memory if it has room, for a disk may take minutes."""
    memory = Path("/dev/shm")
    try:
        if shutil.disk_usage(memory).free > LARGEST_MODEL:
            return Path(tempfile.mkdtemp(prefix="coreinfer-device-", dir=memory))
    except OSError:
        pass
    return work


def ending(lines: list[str]) -> str:
    """What a command's output says in the end, after the first complaints of compilers."""
    complaints = [n for n, s in enumerate(lines) if re.search(r"CMake Error|\berror:|\bfatal\b", s)]
    shown = sorted({*complaints[:2], *range(len(lines))[-3:]})
    return " | ".join(lines[n].strip() for n in shown)[-600:]


class Report:
    """Runs commands within one deadline and keeps what they said."""

    def __init__(self, out: Path, work: Path, seconds: float, kept: Sequence[Stage] = ()) -> None:
        self.out, self.work = out, work
        self.models = work  # where models are written
        self.lock = threading.Lock()
        self.deadline = time.monotonic() + seconds
        self.stages = list(kept)
        self.kept = {stage.name: stage for stage in kept}  # are not run again
        site = str(work / SITE)
        self.reserve = 0.0  # seconds that stages to come have first claim on
        self.env = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0))),
            "COREINFER_TEST_TARGETS": "device",
            "HF_HUB_OFFLINE": "1",
        }
        if not kept:
            (out / "report.log").write_text("")
        cublas = find_cublas()
        if cublas is not None:
            self.env.setdefault("COREINFER_CUBLAS_LIBRARY", str(cublas))
        nvcc = find_tool("nvcc")
        if nvcc is not None:
            self.env["PATH"] = os.pathsep.join([self.env.get("PATH", ""), str(Path(nvcc).parent)])
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

    def has(self, *names: str) -> bool:
        """Whether all of these stages were run before."""
        return all(name in self.kept for name in names)

    def run(
        self,
        name: str,
        command: list[str],
        limit: float,
        cwd: Path = ROOT,
        *,
        rows: bool = False,
    ) -> Stage:
        """Runs a command for at most `limit` seconds, unless its stage is kept.

        Lines of JSON in its output are its data: `rows` of a table, or one object, of which each
        line says more than the one before. A command that fails keeps what it said until then.
        """
        if name in self.kept:
            return self.kept[name]
        limit = min(limit, self.left())
        start = time.monotonic()
        if limit < 5:
            return self.add(Stage(name, False, 0.0, "left out: no time left"))
        text, ok, note = self.execute(command, limit, cwd)
        with self.lock, open(self.out / "report.log", "a") as log:
            log.write(f"==== {name}: {' '.join(command)}\n{text}\n")
        stage = Stage(name, ok, time.monotonic() - start, note)
        found, others = [], []
        for line in text.strip().splitlines():
            read = json_object(line)
            (others if read is None else found).append(line if read is None else read)
        if found:
            stage.data = {"rows": found} if rows else dict(ChainMap(*reversed(found)))
        if not ok or not found:
            stage.note = "; ".join(s for s in [note, ending(others)] if s)
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
        texts = {"json": json.dumps(list(map(asdict, self.stages)), indent=1)}
        texts["md"] = table(self.stages)
        for ending, text in texts.items():
            written = self.out / f"report.{ending}.new"
            written.write_text(text)
            written.replace(self.out / f"report.{ending}")


def kept_stages(out: Path) -> list[Stage]:
    """What a report in this folder has that need not be done again: figures and passed checks."""
    try:
        stages = [Stage(**fields) for fields in json.loads((out / "report.json").read_text())]
    except FileNotFoundError:
        return []
    return [s for s in stages if s.ok and (s.data or s.name in CHECKED)]


def json_object(line: str) -> dict[str, Any] | None:
    """The object that a line of output is; None for other text, brace or not."""
    if not line.startswith("{"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def find_device(report: Report) -> str:
    """The architecture of the GPU by its driver's own word, as CMake has it; empty: no GPU."""
    fields = "name,driver_version,memory.total,compute_cap"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    stage = report.run("device", query, BEFORE["device"])
    capability = re.search(r"(\d+)\.(\d)$", stage.note)
    if stage.ok and capability:
        return "{}{}-real".format(*capability.groups())
    return "native" if stage.ok or Path("/dev/nvidiactl").exists() else ""


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


def build(report: Report, wheels: Path | None, architecture: str) -> bool:
    """Installs the package with CUDA for this device into a folder of its own."""
    site = report.work / SITE
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    if wheels is not None:
        files = map(str, sorted(wheels.glob("*.whl")))
        report.run("wheels", [*pip, str(site), *files], BEFORE["wheels"])
    if not can_run(report, "build", "pip", "scikit_build_core", "nanobind"):
        return False
    if find_tool("nvcc") is None:
        why = f"left out: no nvcc on PATH or in {TOOLKIT / 'bin'}"
        report.add(Stage("build", False, 0.0, why))
        return False
    command = [*pip, str(site), "--upgrade", "--no-build-isolation", str(ROOT)]
    command += ["-Ccmake.define.COREINFER_CUDA=ON"]
    command += [f"-Ccmake.define.COREINFER_CUDA_ARCHITECTURES={architecture}"]
    command += [f"-Cbuild-dir={report.work / 'build'}"]
    return report.run("build", command, BEFORE["build"]).ok


PYTEST = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]


def can_run(report: Report, name: str, *modules: str) -> bool:
    """Whether a stage has the modules that it imports, or is kept; reports it where not."""
    why = "" if report.has(name) else report.lacks(*modules)
    if why:
        report.add(Stage(name, False, 0.0, why))
    return not why


def check(report: Report) -> None:
    """All CUDA tests on the device, and the small ones under compute-sanitizer, side by side."""
    sanitizer = find_tool("compute-sanitizer") or "compute-sanitizer"
    jobs = []
    for what in TESTS:
        name, file = f"tests, {what}", f"tests/test_cuda_{what}.py"
        if can_run(report, name, "pytest", "gguf"):
            jobs.append((name, [*PYTEST, file]))
    for tool in SANITIZERS:
        name = f"sanitizer {tool}"
        command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", "--target-processes=all"]
        if can_run(report, name, "pytest"):
            jobs.append((name, [*command, *PYTEST, SMALL]))
    report.together(jobs)


def bench(report: Report, what: str, name: str, limit: float, **options: Any) -> None:
    """One measurement of device_bench.py as a stage."""
    command = [sys.executable, str(ROOT / "tools" / "device_bench.py"), what]
    for key, value in options.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    report.run(name, command, limit)


def model_bytes(shape: str, dtype: str, layers: int = 0) -> int:
    """Of a synthetic model's file, about."""
    values, size = block_size(dtype.upper())
    full = PAPER[shape]
    specs = tensor_specs(replace(full, n_layer=layers or full.n_layer))
    return sum(math.prod(spec.shape) for spec in specs) * size // values


@contextlib.contextmanager
def made_model(report: Report, shape: str, dtype: str, layers: int = 0) -> Iterator[Path | None]:
    """A synthetic model's file, there for the block; None where it could not be made."""
    path = report.models / f"{shape}-{dtype}-{layers}.gguf"
    command = [sys.executable, "tools/make_synthetic_model.py", "--shape", shape]
    command += ["--type", dtype, "--out", str(path)]
    name = f"make {shape} {dtype}"
    if layers:
        name = device_paper.at_depth(name, layers)
        command += ["--layers", str(layers)]
    try:
        yield path if report.run(name, command, 90).ok else None
    finally:
        path.unlink(missing_ok=True)


def no_time_for(report: Report, name: str, size: int) -> bool:
    """Whether a model of `size` bytes is left out: its first stages would not come to an end.

    A guess, seen on no device: to write it and to load it, a second and a half for each GB.
    """
    needed = 10 + 1.5e-9 * size
    short = report.left() < needed
    if short:
        why = f"left out: no time left ({report.left():.0f} s; it takes {needed:.0f})"
        report.add(Stage(name, False, 0.0, why))
    return short


def peer(report: Report, shape: str, name: str, limit: float, **options: Any) -> None:
    """The same shape in Transformers, under a limit with accelerate."""
    more = ["accelerate"] if "vram_limit" in options else []
    if can_run(report, name, "torch", "transformers", *more):
        bench(report, "transformers", name, limit, shape=shape, **options)


def measure_model(
    report: Report, shape: str, dtype: str, limit: float, llama_bench: Path | None
) -> None:
    """A whole model, ours and the peer's: under a limit and without it, or beside llama.cpp.

    With and without a limit a model reads the same prompt: it is the same core set that decodes.
    """
    name = f"{shape} {dtype}"
    limited = f"{name} in {limit:g} GiB" if limit else ""
    theirs = f"{name} llama-bench" if llama_bench is not None and not limit else ""
    prompt = 64 if limit else 512
    if not report.has(*filter(None, [name, limited, theirs])):
        if no_time_for(report, name, model_bytes(shape, dtype)):
            return
        with made_model(report, shape, dtype) as path:
            if path is None:
                return
            bench(report, "ours", name, 90, model=path, beta="0.2,0.4", prompt=prompt)
            if limited:
                options = {"model": path, "beta": "0.2", "prompt": prompt, "vram_limit": limit}
                bench(report, "ours", limited, 90, **options)
            if theirs:
                command = [str(llama_bench), "-m", str(path), "-ngl", "99", "-o", "jsonl"]
                command += ["-r", "3", "-p", "512", "-n", "64"]
                report.run(theirs, command, 90, rows=True)


def measure(report: Report, llama_bench: Path | None, *, built: bool) -> None:
    """The models one after the other, each deleted before the next is made; the targets' first.

    Where ours was not built the peers are measured alone.
    """
    for shape, dtype, limit in MODELS:
        if built:
            measure_model(report, shape, dtype, limit, llama_bench)
        if limit:
            name = f"{shape} {dtype} transformers in {limit:g} GiB"
            options = {"prompt": 64, "gen": 4, "vram_limit": limit}
            peer(report, shape, name, 90, **options)
    for name, depths in device_paper.SCALED.items() if built else ():
        for layers in depths:
            run = device_paper.at_depth(name, layers)
            if report.has(run) or no_time_for(report, run, model_bytes(*name.split(), layers)):
                continue
            with made_model(report, *name.split(), layers) as path:
                if path is not None:
                    bench(report, "ours", run, 60, model=path, beta="0.2", prompt=64)
    for shape, prompt in (("llama2-7b", 512), ("opt-6.7b", 64)):
        peer(report, shape, f"{shape} f16 transformers", 60, prompt=prompt, gen=32)


def table(stages: list[Stage]) -> str:
    """The stages and the measured figures as Markdown."""
    data = {s.name: s.data for s in stages}
    for name, (few, more) in device_paper.SCALED.items():
        with contextlib.suppress(KeyError, StopIteration):
            full = device_paper.scaled(data, name)
            data[f"{name}, extrapolated from {few} and {more} layers"] = full
    limits = data.get("ceilings", {})
    lines = [f"# {limits.get('device', 'unknown device')}", ""]
    copy = limits.get("copy_bytes_s")
    for what, key, unit, digits in (
        ("Copy (read + written)", "copy_bytes_s", "GB/s", 0),
        ("float16 product", "f16_flop_s", "GFLOP/s", 0),
        ("host to device", "host_to_device_bytes_s", "GB/s", 1),
    ):
        if key in limits:
            lines += [f"{what} {limits[key] / 1e9:.{digits}f} {unit}.", ""]
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
    architecture = find_device(report)
    if not architecture:
        return False
    built = build(report, args.wheels.resolve() if args.wheels else None, architecture)
    if can_run(report, "ceilings", "torch"):
        bench(report, "ceilings", "ceilings", BEFORE["ceilings"])
    if built and can_run(report, "smoke test", "pytest"):
        report.run("smoke test", [*PYTEST, SMALL], BEFORE["smoke test"])
    report.models = model_folder(report.work)
    real = built and args.model and args.golden and not report.has("golden")
    checks = 0.0 if not built or report.has(*CHECKED) else float(CHECKS)
    try:
        report.reserve = checks + (GOLDEN if real else 0)
        measure(report, args.llama_bench.resolve() if args.llama_bench else None, built=built)
        report.reserve = checks
        if real:
            model = joined(report, [part.resolve() for part in args.model])
            if model is not None:
                options = {"model": model, "golden": args.golden.resolve()}
                bench(report, "golden", "golden", GOLDEN, **options)
    finally:
        if report.models != report.work:
            shutil.rmtree(report.models, ignore_errors=True)
    report.reserve = 0.0
    if built:
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
    parser.add_argument(
        "--resume", action="store_true", help="keep what went well in OUT's report, do the rest"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    kept = kept_stages(args.out) if args.resume else []
    report = Report(args.out.resolve(), args.work.resolve(), args.seconds, kept)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # models are deleted
    if not everything(report, args):
        print("no NVIDIA GPU that its driver can see: nothing was measured")
    print((report.out / "report.md").read_text())
    return 0 if all(s.ok for s in report.stages) else 1


if __name__ == "__main__":
    sys.exit(main())
