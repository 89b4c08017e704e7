"""Clusters as a value: its file, what is refused, the neurons chosen from it."""

from __future__ import annotations

import errno
import os
import random

import numpy as np
import pytest

from coreinfer import (
    Clusters,
    CoreConfig,
)
from coreinfer.cluster_lookup import ClusterLookup, blend_scores, core_neurons, top_neurons
from coreinfer.tuning import Tuning
from sidecar_bytes import header_npy, npy, rewrite
from small_clusters import letters, make_clusters, make_prior


def test_saved_clusters_come_back_whole(tmp_path):
    before = make_clusters()
    before.save(tmp_path / "c.npz")
    after = Clusters.load(tmp_path / "c.npz")
    assert after._header() == before._header()
    assert np.array_equal(after.centroids, before.centroids)
    assert np.array_equal(after.n_texts, before.n_texts)
    assert all(np.array_equal(a, b) for a, b in zip(after.scores, before.scores, strict=True))
    assert os.listdir(tmp_path) == ["c.npz"]


def test_a_file_keeps_the_prior(tmp_path):
    before = make_clusters(prior=make_prior())
    before.save(tmp_path / "c.npz")
    after = Clusters.load(tmp_path / "c.npz")
    assert after.digest == before.digest != make_clusters().digest
    for name, array in before.prior.arrays().items():
        np.testing.assert_array_equal(after.prior.arrays()[name], array)
    bad = np.full((4, 64), np.nan, np.float16)
    rewrite(tmp_path / "c.npz", {"patch_h_1": npy(bad)})
    with pytest.raises(ValueError, match="h of layer 1 holds a NaN"):
        Clusters.load(tmp_path / "c.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": []}, "a prior of 0 inputs, 2 outputs and 2 weights"),
        ({"weights": [np.ones(4, np.float32)]}, "2 outputs and 1 weights"),
        ({"h": [np.ones((4, 64), np.float32)] * 2}, "h of layer 0 is float32"),
        ({"y": [np.ones((4, 8), np.float16), np.ones((3, 8), np.float16)]}, "y of layer 1 is"),
        ({"weights": [-np.ones(4, np.float32)] * 2}, "layer 0 has a weight below 0"),
        ({"weights": [np.full(4, np.inf, np.float32)] * 2}, "weights of layer 0 holds"),
    ],
)
def test_a_prior_refuses_what_cannot_be_right(changes, message):
    with pytest.raises(ValueError, match=message):
        make_prior(**changes)


def test_clusters_refuse_the_prior_of_another_shape():
    with pytest.raises(ValueError, match="the prior is of 3 layers with 64 neurons; expected 2"):
        make_clusters(prior=make_prior(3))


def test_the_nearest_cluster_is_that_of_the_largest_cosine():
    clusters = make_clusters()
    cluster, similarity = clusters.nearest(np.array([1, 3, 0, 0, 0.0]))
    assert cluster == 1 and similarity == pytest.approx(3 / np.sqrt(10), rel=1e-6)
    with pytest.raises(ValueError, match=r"shape \(4,\); these clusters have 5.*'letters'"):
        clusters.nearest(np.ones(4))
    with pytest.raises(ValueError, match="the prompt has length 0"):
        clusters.nearest(np.zeros(5))


SCORES = np.ones((3, 64), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"centroids": np.eye(5)[0]}, r"shape \(5,\)"),
        ({"centroids": np.zeros((0, 5))}, r"shape \(0, 5\)"),
        ({"centroids": np.full((3, 5), np.nan)}, "a NaN or an infinity"),
        ({"centroids": 2 * np.eye(3, 5)}, "cluster 0 has length 2; expected 1"),
        ({"scores": []}, "scores of 0 layers"),
        ({"scores": [SCORES, SCORES[:, :63]]}, "layer 1 have shape"),
        ({"scores": [SCORES[:2]]}, "layer 0 have shape"),
        ({"scores": [SCORES[0]]}, "layer 0 have shape"),
        ({"scores": [SCORES, SCORES * np.inf]}, "layer 1 are not all finite"),
        ({"scores": [-SCORES]}, "layer 0 are not all finite and at least 0"),
        ({"scores": [SCORES * [[1], [0], [1]]]}, "cluster 1 has no active neuron in layer 0"),
        ({"n_texts": [4, 2]}, r"n_texts has shape \(2,\)"),
        ({"n_texts": [4, 1, 9]}, "cluster 1 has 1 texts; expected at least 2"),
        ({"statistic": "best"}, "statistic is 'best'; expected one of count"),
        ({"statistic": ""}, "statistic is ''"),
        ({"alpha": 2}, "alpha is 2"),
        ({"by": "colour"}, "by is 'colour'"),
        ({"embedder": ""}, "embedder is ''"),
        ({"embedder": 5}, "embedder is 5"),
        ({"chat": 1}, "chat is 1"),
        ({"weighted": 1}, "weighted is 1; expected True or False"),
        ({"by": "neurons"}, "embedder is 'letters' in clusters by neurons"),
        ({"by": "neurons", "embedder": ""}, "expected one a neuron, 128"),
        ({"by": "neurons", "embedder": "", "centroids": np.eye(3, 128)}, "beta is 0;"),
        ({"fingerprint": 1 << 64}, "fingerprint is 18446744073709551616"),
    ],
)
def test_clusters_that_could_not_be_read_back_cannot_be_made(changes, message):
    with pytest.raises(ValueError, match=message):
        make_clusters(**changes)


def header_with(**changes) -> bytes:
    return header_npy({**make_clusters()._header(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": None}, "header is missing"),
        ({"centroids": None}, "centroids is missing"),
        ({"scores_1": None}, "scores_1 is missing"),
        ({"n_texts": None}, "n_texts is missing"),
        ({"centroids": npy(np.eye(3, 4, dtype=np.float32))}, r"expected float32 \(3, 5\)"),
        ({"centroids": npy(np.eye(3, 5))}, "float64 of shape"),
        ({"centroids": npy(np.asfortranarray(np.eye(3, 5, dtype=np.float32)))}, "not a valid"),
        ({"scores_0": npy(SCORES[:, :63])}, r"expected float32 \(3, 64\)"),
        ({"scores_0": npy(SCORES * np.nan)}, "not all finite"),
        ({"scores_0": npy(SCORES)[:-2]}, "bytes"),
        ({"scores_0": npy(np.array([print], object), allow_pickle=True)}, "not a valid"),
        ({"n_texts": npy(np.array([2, 2]))}, "n_texts has shape"),
        ({"n_texts": npy(np.array([2, 2, 1]))}, "cluster 2 has 1 texts"),
        ({"header": header_with(format="coreinfer core set")}, "does not say"),
        ({"header": header_with(version=2)}, "version 2; this build reads 3"),
        ({"header": header_with(patch_rows=-1)}, "patch_rows is -1"),
        ({"header": header_with(patch_rows=4)}, "n_embd is 0"),
        ({"header": header_with(patch_rows=4, n_embd=8)}, "patch_h_0 is missing"),
        ({"header": header_with(n_layer=3)}, "scores_2 is missing"),
        ({"header": header_with(n_clusters=0)}, "n_clusters is 0"),
        ({"header": header_with(n_features=1 << 40)}, "n_features is"),
        ({"header": header_with(n_ff=True)}, "n_ff is True"),
        ({"header": header_with(alpha="high")}, "alpha is 'high'"),
        ({"header": header_with(beta=float("nan"))}, "beta is nan"),
        ({"header": header_with(by=None)}, "by is None"),
        ({"header": header_with(by=["neurons"])}, "by is"),
        ({"header": header_with(statistic=["flock"])}, "statistic is"),
        ({"header": header_with(embedder=None)}, "embedder is None"),
        ({"header": header_with(chat="yes")}, "chat is 'yes'"),
        ({"header": header_with(weighted=None)}, "weighted is None"),
        ({"header": header_with(fingerprint="xyz")}, "fingerprint is 'xyz'"),
    ],
)
def test_rejects_files_that_do_not_hold_what_they_must(tmp_path, changes, message):
    make_clusters().save(tmp_path / "c.npz")
    rewrite(tmp_path / "c.npz", changes)
    with pytest.raises(ValueError, match=message) as error:
        Clusters.load(tmp_path / "c.npz")
    assert str(tmp_path / "c.npz") in str(error.value)


def test_every_prefix_and_many_mutations_are_refused_or_read_cleanly(tmp_path):
    path = tmp_path / "c.npz"
    make_clusters().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a valid file of clusters"):
            Clusters.load(path)
    rng = random.Random(3)
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            Clusters.load(path)
        except ValueError:
            pass


def test_what_is_no_npz_file_is_not_read_to_its_end(tmp_path):
    model = tmp_path / "model.gguf"
    with open(model, "wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(ValueError, match=r"model\.gguf: .*another kind of file, or was cut short"):
        Clusters.load(model)


def test_a_number_is_no_path_but_an_open_file_s():
    for load in (Clusters.load, Tuning.load):
        number = os.open(os.devnull, os.O_RDONLY)
        with pytest.raises(TypeError, match="not int"):
            load(number)
        os.close(number)  # it still is one


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "c.npz"
    make_clusters().save(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot save the clusters: No space left.*unchanged"):
        make_clusters(chat=False).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.npz"]


# --- choosing neurons ---


def test_top_neurons_are_the_highest_scores_ties_to_the_lower_index_and_never_zero():
    rng = np.random.default_rng(0)
    for n, k in [(1, 1), (7, 3), (64, 20), (64, 64), (300, 1)]:
        for distinct in (2, 5, 1000):
            scores = rng.integers(0, distinct, n).astype(np.float32)
            order = np.lexsort((np.arange(n), -scores))[:k]
            expected = np.sort(order[scores[order] > 0])
            got = top_neurons(scores, k)
            assert got.dtype == np.int32 and np.array_equal(got, expected)


def test_core_neurons_marks_the_share_of_every_layer():
    marks = core_neurons([np.array([3, 1, 2, 0.0]), np.array([0, 0, 0, 1.0])], 0.5)
    assert marks.tolist() == [True, False, True, False, False, False, False, True]


def test_blended_scores_weigh_what_a_token_activates():
    own, cluster = np.array([8, 0, 4], np.float32), np.array([0, 1, 3], np.float32)
    assert blend_scores(own, 4, cluster, 1).tolist() == [2, 0, 1]
    assert blend_scores(own, 4, cluster, 0).tolist() == [0, 1, 3]
    blended = blend_scores(own, 4, cluster, 0.25)
    assert blended.tolist() == [0.5, 0.75, 2.5] and blended.dtype == np.float32


def test_layers_out_of_range_stay_dense():
    lookup = ClusterLookup(make_clusters(centroids=np.eye(3, 27)), letters)
    core = CoreConfig(mode="similar", gamma=0.25, blend=0, layers=(1, None))
    chosen = lookup.choose(core, lookup.nearest("bb"))
    assert chosen.layers[0] is None and chosen.sizes == [64, 16] and chosen.cluster == 1
