"""Core sets as values and as files: what is saved comes back, what is wrong is said."""

from __future__ import annotations

import errno
import io
import os
import random
import threading

import numpy as np
import pytest

from coreinfer.clusters import Clusters
from coreinfer.core_sets import CoreSet
from coreinfer.tuning import Tuning
from sidecar_bytes import header_npy, npy, npy_of_version, rewrite


def make_set(**changes) -> CoreSet:
    rng = np.random.default_rng(1)
    values = {
        "layers": [np.sort(rng.choice(64, 10, replace=False)), None, np.array([0, 63])],
        "n_ff": 64,
        "scores": [rng.random(64, dtype=np.float32), None, rng.random(64, dtype=np.float32)],
        "statistic": "flock",
        "alpha": 0.4,
        "beta": 0.15,
        "n_tokens": 17,
        "stability": 0.75,
        "cluster": 3,
        "cluster_similarity": -0.25,
        "fingerprint": 0xFEDCBA9876543210,
    }
    return CoreSet(**{**values, **changes})


def header_with(**changes) -> bytes:
    return header_npy({**make_set()._header(), **changes})


def test_a_saved_set_comes_back_whole(tmp_path):
    before = make_set()
    before.save(tmp_path / "set.npz")
    after = CoreSet.load(tmp_path / "set.npz")
    assert after.same_neurons(before)
    assert after._header() == before._header()
    for a, b in zip(after.scores, before.scores, strict=True):
        assert (a is None) == (b is None) and (a is None or np.array_equal(a, b))
    assert os.listdir(tmp_path) == ["set.npz"]


def test_a_set_without_scores_or_fingerprint_comes_back(tmp_path):
    unknown = {"fingerprint": None, "stability": None, "cluster": None, "cluster_similarity": None}
    make_set(scores=[], **unknown).save(tmp_path / "set.npz")
    after = CoreSet.load(tmp_path / "set.npz")
    assert after.scores == [] and {name: getattr(after, name) for name in unknown} == unknown


def test_a_set_says_in_a_line_what_it_is():
    assert repr(make_set()) == (
        "<CoreSet: 3 layers, 40 % of 64 neurons, flock, cluster 3, stability 0.75>"
    )
    patch = [(np.ones((2, 3), np.float16), np.ones((8, 2), np.float16))]
    patched = CoreSet([[1, 2, 3]], 6, statistic="count", weighted=True, patch=patch)
    assert str(patched) == (
        "<CoreSet: 1 layers, 50 % of 6 neurons, count weighted, patch of rank 2>"
    )
    assert repr(CoreSet([[1]], 4)) == "<CoreSet: 1 layers, 25 % of 4 neurons>"


def test_sizes_count_dense_layers_as_whole():
    core = make_set()
    assert core.sizes == [10, 64, 2]
    assert core.kept == pytest.approx((10 + 64 + 2) / (3 * 64))


def test_similarity_is_the_share_of_common_neurons():
    a = CoreSet(layers=[[0, 1, 2, 3], [5, 6]], n_ff=8)
    b = CoreSet(layers=[[2, 3, 4, 5], [5, 6]], n_ff=8)
    assert a.similarity(b) == pytest.approx((0.5 + 1.0) / 2)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ([1, 1], "strictly ascending"),
        ([2, 1], "strictly ascending"),
        ([-1, 3], "neuron -1"),
        ([3, 64], "neuron 64"),
        ([], "expected integers"),
        (np.zeros(0, np.int32), "layer 0 keeps no neuron; expected at least one"),
        ([0.0, 1.0], "expected integers"),
        ([[0, 1]], "expected integers"),
        ([2**40], "neuron 1099511627776"),
    ],
)
def test_rejects_neurons_that_cannot_be(layer, message):
    with pytest.raises(ValueError, match=message):
        make_set(layers=[np.array(layer), None, [0]], scores=[])


def test_sets_of_no_common_layer_have_no_similarity():
    a, b = CoreSet(layers=[[0], None], n_ff=8), CoreSet(layers=[None, [0]], n_ff=8)
    with pytest.raises(ValueError, match="select in no common layer"):
        a.similarity(b)


def test_rejects_scores_of_another_shape():
    with pytest.raises(ValueError, match="scores for 1"):
        make_set(scores=[np.zeros(64)])
    with pytest.raises(ValueError, match=r"expected \(64,\)"):
        make_set(scores=[np.zeros(63), None, None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"beta": -1}, "beta is -1"),
        ({"statistic": "best"}, "statistic is 'best'"),
        ({"fingerprint": 1 << 64}, "fingerprint is 18446744073709551616"),
        ({"fingerprint": -1}, "fingerprint is -1"),
        ({"layers": [], "scores": []}, "a core set has 0 layers; expected 1 to 4096"),
        ({"n_ff": 0}, "n_ff is 0; expected 1 to"),
        ({"n_ff": (1 << 24) + 1}, "n_ff is 16777217"),
        ({"patch": [None, (np.ones((1, 1), np.float16),) * 2, None]}, "layer 1 stays dense but"),
    ],
)
def test_a_set_that_could_not_be_read_back_cannot_be_made(change, message):
    with pytest.raises(ValueError, match=message):
        make_set(**change)


def test_a_file_of_more_bytes_than_a_set_can_have_is_not_read(tmp_path, monkeypatch):
    make_set().save(tmp_path / "core.npz")
    size = (tmp_path / "core.npz").stat().st_size
    monkeypatch.setattr("coreinfer.core_sets._MAX_FILE_BYTES", size)
    CoreSet.load(tmp_path / "core.npz")
    monkeypatch.setattr("coreinfer.core_sets._MAX_FILE_BYTES", size - 1)
    with pytest.raises(ValueError, match=f"not a valid core set: it has more than {size - 1} byte"):
        CoreSet.load(tmp_path / "core.npz")


def test_a_set_of_another_model_is_refused():
    core = make_set()
    core.check_fits(n_layer=3, n_ff=64, fingerprint=core.fingerprint)
    with pytest.raises(ValueError, match="3 layers with 64 neurons; this one has 4"):
        core.check_fits(n_layer=4, n_ff=64)
    with pytest.raises(ValueError, match="another model.*fedcba9876543210"):
        core.check_fits(n_layer=3, n_ff=64, fingerprint=1)
    core.for_any_model().check_fits(n_layer=3, n_ff=64, fingerprint=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_0": None}, "layer_0 is missing"),
        ({"header": None}, "header is missing"),
        ({"layer_2": npy(np.array([5, 4], np.int32))}, "strictly ascending"),
        ({"layer_2": npy(np.array([4, 64], np.int32))}, "neuron 64"),
        ({"layer_2": npy(np.array([4, 5], np.int64))}, "expected int32"),
        ({"layer_2": npy(np.array([[4, 5]], np.int32))}, "expected int32"),
        ({"layer_2": npy(np.arange(5000, dtype=np.int32))}, "expected at most"),
        ({"layer_2": npy(np.array([4], np.int32))[:-2]}, "bytes"),
        ({"layer_2": b"no npy at all"}, "not a valid core set"),
        ({"layer_2": npy_of_version(2, np.array([4], np.int32))}, "npy version 2; expected 1"),
        ({"scores_0": npy(np.zeros(63, np.float32))}, r"expected \(64,\)"),
        ({"header": header_with(format="something")}, "does not say"),
        ({"header": header_with(version=99)}, "version 99"),
        ({"header": header_with(n_layer=2**40)}, "n_layer is"),
        ({"header": header_with(n_layer=True)}, "n_layer is True"),
        ({"header": header_with(n_ff=0)}, "n_ff is 0"),
        ({"header": header_with(alpha="high")}, "alpha is 'high'"),
        ({"header": header_with(beta=float("nan"))}, "beta is nan"),
        ({"header": header_with(dense_layers="1")}, "dense_layers"),
        ({"header": header_with(alpha=1.5)}, "alpha is 1.5; expected a number from 0 to 1"),
        ({"header": header_with(beta=-0.1)}, "beta is -0.1"),
        ({"header": header_with(stability=float("-inf"))}, "stability is -inf"),
        ({"header": header_with(cluster=-1)}, "cluster is -1"),
        ({"header": header_with(cluster_similarity=2)}, "cluster_similarity is 2"),
        ({"header": header_with(dense_layers=[1, 1])}, r"dense_layers is \[1, 1\]"),
        ({"header": header_with(dense_layers=[1, 3])}, "different layers from 0 to 2"),
        ({"header": header_with(dense_layers=[True])}, r"dense_layers is \[True\]"),
        ({"header": header_with(dense_layers=[[1]])}, r"dense_layers is \[\[1\]\]"),
        ({"header": header_with(statistic="best")}, "statistic is 'best'; expected one of count"),
        ({"header": header_with(statistic=["flock"])}, "statistic is"),
        ({"header": header_with(fingerprint="xyz")}, "not a valid core set"),
        ({"header": header_with(fingerprint="1" * 17)}, "fingerprint is '1111"),
        ({"header": header_with(fingerprint="-1")}, "fingerprint is '-1'"),
        ({"header": header_with(fingerprint=5)}, "fingerprint is 5"),
        ({"header": header_with(n_tokens=-1)}, "n_tokens is -1"),
        ({"header": npy(np.frombuffer(b"[" * 100000, dtype=np.uint8))}, "not a valid core set"),
    ],
)
def test_rejects_files_that_do_not_hold_what_they_must(tmp_path, changes, message):
    make_set().save(tmp_path / "set.npz")
    rewrite(tmp_path / "set.npz", changes)
    with pytest.raises(ValueError, match=message):
        CoreSet.load(tmp_path / "set.npz")


def test_never_unpickles(tmp_path):
    make_set().save(tmp_path / "set.npz")
    rewrite(tmp_path / "set.npz", {"layer_0": npy(np.array([print], object), allow_pickle=True)})
    with pytest.raises(ValueError, match="not a valid core set"):
        CoreSet.load(tmp_path / "set.npz")


def test_a_header_that_promises_a_huge_array_costs_no_memory(tmp_path):
    make_set().save(tmp_path / "set.npz")
    fake = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        fake, {"descr": "<i4", "fortran_order": False, "shape": (1 << 50,)}
    )
    rewrite(tmp_path / "set.npz", {"layer_2": fake.getvalue()})
    with pytest.raises(ValueError, match="layer_2 has 0 bytes"):
        CoreSet.load(tmp_path / "set.npz")


def test_every_prefix_and_many_mutations_are_refused_or_read_cleanly(tmp_path):
    path = tmp_path / "set.npz"
    make_set(scores=[]).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a valid core set"):
            CoreSet.load(path)
    rng = random.Random(3)
    for _ in range(500):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            CoreSet.load(path)
        except ValueError:
            pass


def test_a_file_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        CoreSet.load(tmp_path / "none.npz")


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "set.npz"
    make_set().save(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*unchanged") as error:
        make_set(n_tokens=99).save(path)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["set.npz"]


def test_a_device_or_pipe_is_never_replaced_by_a_file(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="cannot save the core set: expected a new file or a regular"):
        make_set().save(path)
    assert path.is_fifo() and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("of_a_kind", [CoreSet, Clusters, Tuning])
def test_a_pipe_a_device_or_a_folder_is_refused_and_not_waited_for(tmp_path, of_a_kind):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # Whoever opens the pipe to read finds it empty and does not wait for ever.
    writer = threading.Thread(target=lambda: open(pipe, "wb").close(), daemon=True)
    writer.start()
    for path in (pipe, tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path}: not a valid .*: it is no regular file"):
            of_a_kind.load(path)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer.join()
    os.close(reader)


def test_a_folder_that_is_not_there_is_an_oserror_that_says_what_failed(tmp_path):
    with pytest.raises(OSError, match="cannot save the core set"):
        make_set().save(tmp_path / "none" / "set.npz")
