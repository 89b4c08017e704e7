"""Builds cuda/ with the C++ compiler against the runtime beside this file, once a source state."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RUNTIME = [HERE / "accesses.cpp", HERE / "fibers.cpp", HERE / "runtime.cpp"]
SOURCES = [
    *sorted((ROOT / "cuda").glob("*.cu")),
    *RUNTIME,
    ROOT / "cpp" / "base" / "error.cpp",
    ROOT / "cpp" / "base" / "thread_pool.cpp",
]
FLAGS = (
    "-x c++ -std=c++20 -O1 -ffp-contract=off -fPIC -fvisibility=hidden "
    "-Wno-unknown-pragmas -DCOREINFER_CUDA_HOST"
).split()


# Of cuda/: each access is told to accesses.cpp, which has the functions of the thread sanitizer;
# one at an address that its type does not allow, or outside an array, ends the process.
WATCHED = (
    "-fsanitize=thread --param tsan-instrument-func-entry-exit=0 "
    "-fsanitize=alignment,bounds,shift,integer-divide-by-zero -fno-sanitize-recover=all"
).split()


class NoCompiler(RuntimeError):
    """No C++ compiler on this machine."""


def host_library() -> Path:
    """Path of the CUDA backend compiled for the host."""
    return _library("coreinfer_cuda_host", SOURCES)


def cublas_library() -> Path:
    """Path of a stand-in for cuBLAS, for COREINFER_CUBLAS_LIBRARY."""
    return _library("cublas_host", [HERE / "cublas.cpp"])


def interleaved_library() -> Path:
    """Path of interleaved.cpp, which uses the CUDA backend through its interface alone."""
    return _library("interleaved", [HERE / "interleaved.cpp"])


def faults_library() -> Path:
    """Path of faults.cu, whose faults the runtime finds."""
    return _library("faults", [HERE / "faults.cu", *RUNTIME])


def _library(name: str, sources: list[Path]) -> Path:
    """Compiles and links the sources, unless that has been done.

    Raises
    ------
    NoCompiler
        Where neither $CXX nor c++ nor g++ can be run.
    subprocess.CalledProcessError
        Where a source does not compile; the compiler's words are in ``stderr``.
    """
    compiler = next(
        (c for c in (os.environ.get("CXX", ""), "c++", "g++") if c and shutil.which(c)), None
    )
    if compiler is None:
        raise NoCompiler("no C++ compiler found (CXX, c++, g++)")
    headers = [*(ROOT / "cuda").glob("*.h"), *HERE.glob("*.h"), *(HERE / "include").glob("*.h")]
    headers += [ROOT / "cpp" / "backend" / n for n in ("backend.h", "cuda_loader.h")]
    digest = hashlib.sha256(" ".join([compiler, *FLAGS, *WATCHED]).encode())
    for path in [*sources, *sorted(headers)]:
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"coreinfer-cuda-host-{os.getuid()}"
    library = folder / f"lib{name}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(mode=0o700, exist_ok=True)
    includes = [f"-I{HERE / 'include'}", f"-I{ROOT / 'cuda'}", f"-I{ROOT / 'cpp'}"]

    with tempfile.TemporaryDirectory(dir=folder) as work:

        def compile_one(source: Path) -> str:
            out = str(Path(work) / (source.name + ".o"))
            watched = WATCHED if source.suffix == ".cu" else ["-O2"]
            command = [compiler, *FLAGS, *watched, *includes, "-c", str(source), "-o", out]
            subprocess.run(command, check=True, capture_output=True, text=True)
            if source.suffix == ".cu":
                # cuda/ has no variables but those in shared memory: fibers.cpp finds them by this.
                rename = ["objcopy", "--rename-section", ".bss=cuda_shared", out]
                subprocess.run(rename, check=True, capture_output=True, text=True)
            return out

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = str(Path(work) / "linked.so")
        link = [compiler, "-shared", "-o", linked, *objects, "-ldl", "-lubsan", "-Wl,-z,defs"]
        subprocess.run(link, check=True, capture_output=True, text=True)
        os.replace(linked, library)
    return library
