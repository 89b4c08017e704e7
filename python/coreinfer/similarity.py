"""SimilarityClusters: groups of similar texts and the neurons each group activates, learned.

Flows in: what texts are compared by (sentence embeddings or core neurons) and their neuron scores.
Flows out: centroids and mean scores; `build_clusters` reads texts with a model and packs what was
learned as `Clusters`. Needs scikit-learn, which comes with the extra `similarity`.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import operator
import os
import reprlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from . import _core
from .cluster_lookup import core_neurons
from .clusters import FEATURES, Clusters, unit_rows
from .config import CoreConfig
from .embedders import DEFAULT_EMBEDDER, AnyEmbedder, as_embedder
from .patch_prior import MAX_ROWS, PATCH_ROWS, PatchPriorBuilder

if TYPE_CHECKING:
    from .llama import Llama

_MIN_TEXTS = 2  # of a cluster: one text says nothing of others like it
_TOKENS_OF_A_TEXT = 64  # that a prior is made of
_SILHOUETTE_SAMPLE = 2000  # texts; the silhouette's cost grows with their square


class NotFittedError(RuntimeError):
    """Clusters are asked of before they were learned."""


class SimilarityClusters:
    """K-means by cosine over texts, with the mean neuron scores of every cluster.

    Parameters
    ----------
    n_clusters : int or "auto", default "auto"
        "auto" takes the number, from 2 to `max_clusters`, whose silhouette is highest.
    max_clusters : int, default 16
        Most clusters that "auto" tries.
    n_init : int, default 10
        Starts of every k-means; the best is kept.
    embedder : str, path, callable or None, default None
        Makes vectors of texts, where `fit` and `predict` are given texts; see
        `coreinfer.embedders.as_embedder`.
    random_state : int or None, default None
        Seed of the starts; the same seed gives the same clusters.

    Attributes
    ----------
    cluster_centers_ : ndarray float32 (n_clusters_, n_features_in_)
        Directions of the clusters, rows of length 1.
    labels_ : ndarray int64 (n_texts,)
        The cluster of every text, as `predict` gives it.
    scores_ : ndarray float32 (n_clusters_, n_layer, n_ff)
        Mean neuron scores of every cluster's texts.
    n_texts_ : ndarray int64 (n_clusters_,)
        Texts of every cluster, at least 2.
    silhouettes_ : dict of int to float
        The silhouette of every number that "auto" tried; empty for a given number.
    n_clusters_, n_features_in_ : int

    Examples
    --------
    >>> import numpy as np
    >>> from coreinfer.similarity import SimilarityClusters
    >>> embeddings = np.array([[1, 0.1], [1, 0], [0, 1], [0.1, 1]])
    >>> scores = np.array([[[3, 0]], [[1, 0]], [[0, 2]], [[0, 2]]])  # 1 layer of 2 neurons
    >>> clusters = SimilarityClusters(2, random_state=0).fit(embeddings, scores)
    >>> near_the_first = clusters.predict([[0.9, 0.2]])[0]
    >>> clusters.scores_[near_the_first]
    array([[2., 0.]], dtype=float32)
    """

    def __init__(
        self,
        n_clusters: int | str = "auto",
        *,
        max_clusters: int = 16,
        n_init: int = 10,
        embedder: AnyEmbedder | None = None,
        random_state: int | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.max_clusters = max_clusters
        self.n_init = n_init
        self.embedder = embedder
        self.random_state = random_state

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's parameters, by scikit-learn's convention (`sklearn.base.clone`)."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> SimilarityClusters:
        """Set parameters by name; ValueError, before any is set, for one that there is not."""
        for name in params:
            if name not in _PARAMETERS:
                raise ValueError(f"{name!r} is no parameter; there are {', '.join(_PARAMETERS)}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        given = self.get_params().items()
        words = [f"{name}={value!r}" for name, value in given if value != _PARAMETERS[name]]
        return f"SimilarityClusters({', '.join(words)})"

    def fit(self, X: Any, scores: Any) -> SimilarityClusters:
        """Learn clusters.

        Parameters
        ----------
        X : array (n_texts, n_features), or list of str if there is an embedder
            What texts are compared by.
        scores : array (n_texts, n_layer, n_ff)
            Neuron scores of every text; may be a memory map, it is read text by text.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            There are too few texts, shapes do not fit, a parameter is out of its range, or a
            cluster would have a single text.
        ImportError
            The extra `similarity` is not installed.
        """
        unit = unit_rows(self._features(X), "the texts")
        n_texts = len(unit)
        self._check(n_texts)
        if np.ndim(scores) != 3 or len(scores) != n_texts:
            raise ValueError(
                f"scores have shape {np.shape(scores)}; expected ({n_texts}, n_layer, n_ff), one "
                "for every text"
            )
        centers = self._centers(unit)
        labels = (unit @ centers.T).argmax(axis=1)
        sums = np.zeros((len(centers), *np.shape(scores)[1:]), dtype=np.float64)
        for label, score in zip(labels, scores, strict=True):
            sums[label] += score
        self.n_texts_ = np.bincount(labels, minlength=len(centers)).astype(np.int64)
        self.scores_ = (sums / self.n_texts_[:, None, None]).astype(np.float32)
        self.cluster_centers_ = centers
        self.labels_ = labels
        self.n_clusters_, self.n_features_in_ = centers.shape
        return self

    def fit_predict(self, X: Any, scores: Any) -> np.ndarray:
        """`fit`, and the cluster of every text: `labels_`."""
        return self.fit(X, scores).labels_

    def predict(self, X: Any) -> np.ndarray:
        """The cluster of every row or text, int64 (n,): that of the largest cosine."""
        return self.transform(X).argmax(axis=1)

    def transform(self, X: Any) -> np.ndarray:
        """Cosine of every row or text to every centroid, float32 (n, n_clusters_).

        Before `fit`, a `NotFittedError`.
        """
        if not hasattr(self, "cluster_centers_"):
            raise _not_fitted("these SimilarityClusters are not fitted; call fit first")
        features = self._features(X)
        if features.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {features.shape[1]} features; expected {self.n_features_in_}, as in fit"
            )
        return unit_rows(features, "X") @ self.cluster_centers_.T

    def _check(self, n_texts: int) -> None:
        """ValueError where these parameters cannot cluster so many texts."""
        if n_texts < _MIN_TEXTS:
            raise ValueError(f"{n_texts} texts to cluster; expected at least {_MIN_TEXTS}")
        most = n_texts // _MIN_TEXTS
        if self.n_clusters != "auto" and self._whole("n_clusters") > most:
            raise ValueError(
                f"n_clusters is {self.n_clusters}; expected at most {most}, for there are "
                f"{n_texts} texts and every cluster needs {_MIN_TEXTS}"
            )
        seed = self.random_state
        whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
        if seed is not None and not (whole and 0 <= seed < 1 << 32):  # NumPy's own range
            raise ValueError(f"random_state is {seed!r}; expected None or 0 to 2**32 - 1")

    def _features(self, X: Any) -> np.ndarray:
        if len(X) and isinstance(X[0], str):
            if self.embedder is None:
                raise ValueError("X holds texts; give an embedder, or their embeddings")
            X = as_embedder(self.embedder)(X)
        features = np.asarray(X)
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"X has shape {features.shape}; expected (n_texts, n_features)")
        return features

    def _centers(self, unit: np.ndarray) -> np.ndarray:
        """Centroids of unit rows, for the given number of clusters or for the best one."""
        points = _coordinates(unit)
        self.silhouettes_: dict[int, float] = {}
        if self.n_clusters != "auto":
            n_clusters = self._whole("n_clusters")
            centers = self._k_means(unit, points, n_clusters)
            sizes = _sizes(unit, centers)
            if len(centers) < n_clusters:
                raise ValueError(
                    f"n_clusters is {n_clusters}; the {len(unit)} texts differ in no more than "
                    f"{len(centers)} groups"
                )
            if sizes.min() < _MIN_TEXTS:
                raise ValueError(
                    f"with {n_clusters} clusters, cluster {int(sizes.argmin())} of {len(unit)} "
                    f"texts has {sizes.min()}; expected at least {_MIN_TEXTS} in each: ask for "
                    "fewer clusters, or give more texts"
                )
            return centers
        best = self._k_means(unit, points, 1)
        for n_clusters in range(2, min(self._whole("max_clusters"), len(unit) // 2) + 1):
            centers = self._k_means(unit, points, n_clusters)
            if len(centers) < n_clusters or _sizes(unit, centers).min() < _MIN_TEXTS:
                continue
            silhouette = self._silhouette(points, (unit @ centers.T).argmax(axis=1))
            if silhouette > max(self.silhouettes_.values(), default=-np.inf):
                best = centers
            self.silhouettes_[n_clusters] = silhouette
        return best

    def _k_means(self, unit: np.ndarray, points: np.ndarray, n_clusters: int) -> np.ndarray:
        """Directions of the clusters' means, (n_clusters, n_features)."""
        k_means = _sklearn().cluster.KMeans(
            n_clusters, n_init=self._whole("n_init"), random_state=self.random_state
        )
        with warnings.catch_warnings():
            # Fewer different points than clusters; the callers look at what was found.
            warnings.simplefilter("ignore", _sklearn().exceptions.ConvergenceWarning)
            labels = k_means.fit(points).labels_
        means = np.stack([unit[labels == k].mean(axis=0) for k in np.unique(labels)])
        return unit_rows(means, "the centroids")

    def _silhouette(self, points: np.ndarray, labels: np.ndarray) -> float:
        sample = _SILHOUETTE_SAMPLE if len(points) > _SILHOUETTE_SAMPLE else None
        return float(
            _sklearn().metrics.silhouette_score(
                points, labels, metric="cosine", sample_size=sample, random_state=self.random_state
            )
        )

    def _whole(self, name: str) -> int:
        value = getattr(self, name)
        try:
            if isinstance(value, bool) or operator.index(value) < 1:
                raise TypeError
        except TypeError:
            also = ', or "auto"' if name == "n_clusters" else ""
            raise ValueError(f"{name} is {value!r}; expected a positive integer{also}") from None
        return operator.index(value)


# Names and defaults of the constructor's parameters.
_PARAMETERS = {p.name: p.default for p in inspect.signature(SimilarityClusters).parameters.values()}


def _sklearn() -> Any:
    try:
        import sklearn.cluster
        import sklearn.exceptions
        import sklearn.metrics
    except ImportError as error:
        raise ImportError(
            'clustering needs the extra similarity: pip install "coreinfer-cpp[similarity]"'
        ) from error
    return sklearn


def _not_fitted(message: str) -> Exception:
    """A `NotFittedError`, which is scikit-learn's too where that is installed."""
    try:
        from sklearn.exceptions import NotFittedError as Theirs
    except ImportError:
        return NotFittedError(message)
    return type("NotFittedError", (NotFittedError, Theirs), {})(message)


def _sizes(unit: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return np.bincount((unit @ centers.T).argmax(axis=1), minlength=len(centers))


def _coordinates(unit: np.ndarray) -> np.ndarray:
    """Points of the same distances as the rows, in at most as many dimensions as there are rows.

    300 texts of 300,000 neurons need 300. From the Gram matrix U L Uᵀ of the rows: U sqrt(L).
    """
    n_texts, n_features = unit.shape
    if n_features <= n_texts:
        return unit
    values, vectors = np.linalg.eigh((unit @ unit.T).astype(np.float64))
    return vectors * np.sqrt(values.clip(min=0))


def build_clusters(
    llm: Llama,
    texts: Sequence[str],
    *,
    by: str = "embedding",
    embedder: AnyEmbedder = DEFAULT_EMBEDDER,
    n_clusters: int | str = "auto",
    statistic: str = CoreConfig.statistic,
    alpha: float = CoreConfig.alpha,
    weighted: bool = CoreConfig.weighted,
    beta: float = CoreConfig.beta,
    chat: bool = False,
    patch_rows: int = PATCH_ROWS,
    random_state: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Clusters:
    """Read texts with a model and learn its clusters.

    Parameters
    ----------
    llm
        The model; its cache holds the last text afterwards.
    texts
        At least two, none empty.
    by
        "embedding" compares texts by their sentence embeddings, "neurons" by the share `beta` of
        neurons that each activates most.
    embedder
        See `coreinfer.embedders.as_embedder`; not used for "neurons".
    n_clusters, random_state
        See `SimilarityClusters`.
    statistic, alpha, weighted
        See `coreinfer.config.CoreConfig`.
    chat
        Read every text through the model's chat template, as `create_chat_completion` does.
    patch_rows
        Rows of the prior that patches learn from beside the prompt; 0 makes none.
    progress
        Called with (texts read, texts in all).

    Raises
    ------
    ValueError
        There are too few texts, one does not fit the context, or an argument is out of range.
    ImportError
        The extra `similarity` is not installed.
    """
    if by not in FEATURES:
        raise ValueError(f"by is {by!r}; expected one of {', '.join(FEATURES)}")
    config = CoreConfig(statistic=statistic, alpha=alpha, weighted=weighted, beta=beta)
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"texts is {texts[:40]!r}; expected a sequence of texts, not one")
    # What cannot be is said before the model has worked for an hour.
    model = SimilarityClusters(n_clusters, random_state=random_state)
    model._check(len(texts))
    if not isinstance(patch_rows, int) or not 0 <= patch_rows <= MAX_ROWS:
        raise ValueError(f"patch_rows is {patch_rows!r}; expected an integer from 0 to {MAX_ROWS}")
    prior = PatchPriorBuilder(llm.n_layer(), patch_rows) if patch_rows else None
    _sklearn()
    if by == "neurons":
        config.check_fits(n_layer=llm.n_layer(), n_ff=llm.n_ff())
    prompts = [_ids_of(llm, i, text, chat) for i, text in enumerate(texts)]
    embed = as_embedder(embedder) if by == "embedding" else None
    features = [] if embed is None else embed(texts)
    with _scores_file(len(texts) * llm.n_layer() * llm.n_ff() * 4) as file:
        for i, ids in enumerate(prompts):
            scored = llm.neuron_scores(
                ids,
                statistic=config.statistic,
                alpha=config.alpha,
                weighted=config.weighted,
                samples=0 if prior is None else _core.PATCH_SAMPLES,
            )
            # Written, not mapped: where a disk is full, a page of a mapping kills the process.
            file.write(scored.tobytes())
            if prior is not None:
                _learn(prior, llm)
            if progress is not None:
                progress(i + 1, len(texts))
        file.flush()
        shape = (len(texts), llm.n_layer(), llm.n_ff())
        scores = np.memmap(file, dtype=np.float32, mode="r", shape=shape)
        if embed is None:
            features = np.stack([core_neurons(score, config.beta) for score in scores])
        model.fit(features, scores)
    return Clusters(
        centroids=model.cluster_centers_,
        scores=list(model.scores_.swapaxes(0, 1)),
        n_texts=model.n_texts_,
        statistic=config.statistic,
        alpha=config.alpha,
        weighted=config.weighted,
        by=by,
        embedder="" if embed is None else embed.name,
        beta=config.beta if embed is None else 0.0,
        chat=chat,
        fingerprint=llm.fingerprint,
        prior=None if prior is None else prior.build(llm.n_ff()),
    )


def _ids_of(llm: Llama, i: int, text: str, chat: bool) -> np.ndarray:
    try:
        if chat:
            return llm.chat_prompt_ids([{"role": "user", "content": text}])
        return llm.prompt_ids(text)
    except ValueError as error:
        raise ValueError(f"text {i + 1} ({reprlib.repr(text)}): {error}") from error


@contextlib.contextmanager
def _scores_file(n_bytes: int) -> Iterator[BinaryIO]:
    """A temporary file for so many bytes; OSError that says where they were to go."""
    try:
        with tempfile.TemporaryFile() as file:
            if n_bytes > shutil.disk_usage(tempfile.gettempdir()).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield file
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        reason = (
            f"{n_bytes / 1e6:.1f} MB of neuron scores need a place while clusters are built: "
            f"{error.strerror}; free some, or set TMPDIR to another folder"
        )
        raise OSError(error.errno, reason, tempfile.gettempdir()) from error


def _learn(prior: PatchPriorBuilder, llm: Llama) -> None:
    """Takes tokens of the text that was read last."""
    for layer in range(llm.n_layer()):
        h, y = llm.ffn_samples(layer)
        picks = np.unique(np.linspace(0, len(h) - 1, _TOKENS_OF_A_TEXT).round().astype(int))
        prior.add(layer, h[picks], y[picks])
