"""GGUF files as files: what the system refuses, split sets, and changes while in use."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from coreinfer import _core
from gguf_bytes import I32, STRING, U16, Gguf, small_model

# ---- Opening -------------------------------------------------------------------------------------


def test_missing_file_is_an_os_error(tmp_path):
    path = tmp_path / "missing.gguf"
    with pytest.raises(OSError, match=f"{path}: cannot open: No such file"):
        _core.GgufFile(path)


def test_directory_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}: cannot read: Is a directory"):
        _core.GgufFile(tmp_path)


def test_empty_file_is_an_os_error(tmp_path):
    path = tmp_path / "empty.gguf"
    path.touch()
    with pytest.raises(OSError, match=f"{path}: the file is empty"):
        _core.GgufFile(path)


def test_no_permission_is_an_os_error(tmp_path):
    path = small_model().write(tmp_path / "model.gguf")
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(OSError, match=f"{path}: cannot open: Permission denied"):
            _core.GgufFile(path)
    finally:
        os.seteuid(user)


def test_named_pipe_is_refused_without_waiting(tmp_path):
    path = tmp_path / "pipe.gguf"
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        _core.GgufFile(path)


def test_path_with_nul_is_refused(tmp_path):
    with pytest.raises(ValueError, match="null byte"):
        _core.GgufFile(str(tmp_path / "a\0b"))


def test_path_may_be_str_bytes_or_pathlike_and_not_utf8(tmp_path):
    path = small_model().write(tmp_path / "model.gguf")
    odd = os.fsencode(tmp_path) + b"/\xff.gguf"
    os.link(path, odd)
    for given in (path, str(path), os.fsencode(path), odd, os.fsdecode(odd)):
        assert _core.GgufFile(given).path == os.fsdecode(given)
        assert _core.GgufFile(given).files == [os.fsdecode(given)]


def test_error_about_a_path_that_is_not_utf8_shows_it_escaped(tmp_path):
    with pytest.raises(OSError, match=r"/\\xff\.gguf: cannot open: No such file"):
        _core.GgufFile(os.fsencode(tmp_path) + b"/\xff.gguf")


# ---- Split sets ----------------------------------------------------------------------------------


def split_set(folder, count=3, **changes):
    """Writes a split model of one tensor a part; `changes` maps a part's number to overrides."""
    paths = []
    for i in range(count):
        keys = {"split.no": i, "split.count": count, "split.tensors.count": count}
        keys.update(changes.get(f"part_{i + 1}", {}))
        g = Gguf()
        if i == 0:
            g.kv("general.name", STRING, "split")
        for key, number in keys.items():
            if number is not None:
                g.kv(key, I32 if key.endswith("tensors.count") else U16, number)
        g.tensor(changes.get("name", f"t{i}"), [4], "F32", np.full(4, i, np.float32).tobytes())
        paths.append(g.write(folder / f"m-{i + 1:05d}-of-{count:05d}.gguf"))
    return paths


def test_reads_all_parts_of_a_split_set(tmp_path):
    paths = split_set(tmp_path)
    file = _core.GgufFile(paths[0])
    assert file.files == [str(p) for p in paths]
    assert file.metadata["general.name"] == "split"
    assert [(t.name, t.part) for t in file.tensors] == [("t0", 0), ("t1", 1), ("t2", 2)]
    for i in range(3):
        np.testing.assert_array_equal(file.dequantize(f"t{i}"), [[i] * 4])


def test_fingerprint_of_a_split_set_depends_on_every_part(tmp_path):
    paths = split_set(tmp_path)
    before = _core.GgufFile(paths[0]).fingerprint
    content = bytearray(paths[2].read_bytes())
    content[-1] ^= 1
    paths[2].write_bytes(content)
    assert _core.GgufFile(paths[0]).fingerprint != before


def test_missing_part_is_named(tmp_path):
    paths = split_set(tmp_path)
    paths[1].unlink()
    with pytest.raises(OSError, match=f"part 2 of 3 cannot be read: {paths[1]}: cannot open"):
        _core.GgufFile(paths[0])


def test_rejects_a_later_part_and_names_the_first(tmp_path):
    paths = split_set(tmp_path)
    with pytest.raises(_core.GGUFError, match=f"part 2 of 3; open the first, {paths[0]}"):
        _core.GgufFile(paths[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part_2": {"split.no": 2}}, "00002-of-00003.gguf: metadata key 'split.no' is 2, exp.* 1"),
        ({"part_3": {"split.no": None}}, "00003-of-00003.gguf: .*'split.no' is missing"),
        (
            {"part_2": {"split.count": 4}},
            "'split.count' is 4, expected 3; the parts are not of one",
        ),
        ({"part_3": {"split.tensors.count": 9}}, "'split.tensors.count' is 9, expected 3"),
        ({"part_1": {"split.tensors.count": None}}, "'split.tensors.count' is missing"),
        ({"part_1": {"split.no": 1}}, "'split.no' is 1, expected 0 by the name of the file"),
        ({"part_1": {"split.count": 2}}, "expected a file name that ends in -00001-of-00002.gguf"),
        ({"part_1": {"split.count": 65535}}, "'split.count' is 65535, at most 1000"),
        ({"name": "same"}, "tensor 'same' is there twice"),
        (
            {f"part_{i}": {"split.tensors.count": 4} for i in (1, 2, 3)},
            "'split.tensors.count' is 4, found 3 tensors in 3 parts",
        ),
    ],
)
def test_rejects_inconsistent_split_set(tmp_path, changes, message):
    paths = split_set(tmp_path, **changes)
    with pytest.raises(_core.GGUFError, match=message):
        _core.GgufFile(paths[0])


def test_rejects_malformed_later_part_by_its_own_name(tmp_path):
    paths = split_set(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    with pytest.raises(_core.GGUFError, match=f"{paths[2]}: tensor 't2': 16 bytes expected"):
        _core.GgufFile(paths[0])


def test_rejects_first_part_under_another_name(tmp_path):
    path = split_set(tmp_path)[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(_core.GGUFError, match="one of 3 parts .* -00001-of-00003.gguf"):
        _core.GgufFile(path)


# ---- Changes while in use ------------------------------------------------------------------------


@pytest.fixture
def big_file(tmp_path):
    """One tensor of 1 MiB, all ones."""
    ones = np.ones(2**18, np.float32)
    return Gguf().tensor("t", [512, 512], "F32", ones.tobytes()).write(tmp_path / "big.gguf")


def test_truncation_while_mapped_is_an_os_error(big_file):
    file = _core.GgufFile(big_file)
    assert file.dequantize("t").sum() == 2**18
    os.truncate(big_file, 4096)
    with pytest.raises(OSError, match=f"{big_file}: truncated while in use: 10.* bytes at open, 4"):
        file.dequantize("t")
    with pytest.raises(OSError, match="truncated while in use"):
        file.check_unchanged()


def test_writing_while_mapped_is_an_os_error(big_file):
    file = _core.GgufFile(big_file)
    with open(big_file, "r+b") as f:
        f.seek(100_000)
        f.write(b"\xff" * 16)
    later = time.time_ns() + 10**9
    os.utime(big_file, ns=(later, later))  # a clock tick may be coarser than this test
    with pytest.raises(OSError, match=f"{big_file}: written to while in use"):
        file.dequantize("t")


def test_growth_while_mapped_is_an_os_error(big_file):
    file = _core.GgufFile(big_file)
    os.truncate(big_file, big_file.stat().st_size + 1)
    with pytest.raises(OSError, match="grown while in use"):
        file.check_unchanged()


def test_replacement_by_rename_keeps_the_old_file_whole(big_file, tmp_path):
    file = _core.GgufFile(big_file)
    os.replace(small_model().write(tmp_path / "new.gguf"), big_file)
    assert file.dequantize("t").sum() == 2**18
    big_file.unlink()
    file.check_unchanged()


def test_check_of_an_unchanged_file_costs_microseconds(big_file):
    file = _core.GgufFile(big_file)
    n = 2000
    start = time.perf_counter()
    for _ in range(n):
        file.check_unchanged()
    # One fstat and one call from Python; 50 us leaves room for a loaded or virtualised machine.
    assert (time.perf_counter() - start) / n < 50e-6


def test_lost_page_reads_as_zeros_and_is_reported(big_file):
    """The read happens between the checks: what keeps the process alive is the SIGBUS guard."""
    mapped = _core.testing.MmapFile(str(big_file))
    before = os.stat(big_file)
    tail = mapped.size - 1000
    assert mapped.read_mapped(tail, 4) == np.float32(1).tobytes()
    os.truncate(big_file, 4096)
    assert mapped.read_mapped(tail, 1000) == bytes(1000)
    with pytest.raises(OSError, match="truncated while in use"):
        mapped.check_unchanged()
    # Restored in every respect that can be asked for, it stays broken: results were lost.
    os.truncate(big_file, before.st_size)
    os.utime(big_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OSError, match="a page could not be read while in use"):
        mapped.check_unchanged()


def test_many_lost_pages_in_several_mappings_and_threads(big_file):
    """A process of its own, so that a failure is a signal there and not the end of the tests."""
    code = f"""
import os, threading
from coreinfer import _core
files = [_core.testing.MmapFile({str(big_file)!r}) for _ in range(4)]
os.truncate({str(big_file)!r}, 4096)
found = []
def read(f):
    found.append(f.read_mapped(4096, f.size - 4096) == bytes(f.size - 4096))
threads = [threading.Thread(target=read, args=(f,)) for f in files for _ in range(2)]
[t.start() for t in threads]
[t.join() for t in threads]
assert found == [True] * 8
for f in files:
    try:
        f.check_unchanged()
    except OSError:
        continue
    raise SystemExit("not reported")
print("alive")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "alive\n", result


@pytest.mark.parametrize(
    "fault",
    [
        "os.kill(os.getpid(), signal.SIGBUS)",
        "m = mmap.mmap(os.open(other, os.O_RDWR), 8192); os.truncate(other, 0); m[5000]",
    ],
    ids=["sent", "another mapping"],
)
def test_other_bus_errors_keep_their_meaning(big_file, tmp_path, fault):
    other = tmp_path / "other"
    other.write_bytes(bytes(2 * mmap.PAGESIZE))
    code = f"""
import mmap, os, signal
from coreinfer import _core
file = _core.GgufFile({str(big_file)!r})
other = {str(other)!r}
{fault}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert result.returncode == -signal.SIGBUS


def test_advice_does_not_change_what_is_read(big_file):
    mapped = _core.testing.MmapFile(str(big_file))
    before = mapped.read_mapped(0, mapped.size)
    mapped.advise_dontneed()
    mapped.advise_willneed()
    assert mapped.read_mapped(0, mapped.size) == before
    mapped.check_unchanged()


def test_mapping_and_descriptor_are_given_back(big_file):
    for _ in range(5000):  # more than the table of mappings and the usual limit of descriptors
        _core.GgufFile(big_file)
