"""Clusters of training texts, and how strongly each cluster activates every neuron.

`Clusters` is a plain value: `similarity.build_clusters` makes it, `cluster_lookup` chooses the
neurons of a prompt by it. Its file is a `.npz` without pickle: `centroids` (n_clusters, n_features)
float32, `scores_<layer>` (n_clusters, n_ff) float32, `n_texts` (n_clusters) int64 and a JSON
header; where there is a prior for patches, also `patch_h_<layer>` (patch_rows, n_ff) and
`patch_y_<layer>` (patch_rows, n_embd), float16, and `patch_weights_<layer>` (patch_rows) float32.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import sidecar
from .config import STATISTICS
from .patch_prior import MAX_EMBD, MAX_ROWS, PatchPrior
from .sidecar import MAX_CLUSTERS, MAX_FF, MAX_LAYERS, Archive, fingerprint_of, number, whole

FORMAT_NAME = "coreinfer clusters"
FORMAT_VERSION = 3
FEATURES = ("embedding", "neurons")  # what texts are compared by
_MAX_FEATURES = 1 << 28
_MAX_NAME = 4096
_MAX_FILE_BYTES = 1 << 34


@dataclass(frozen=True, eq=False)
class Clusters:
    """What `build_clusters` learns of a model from a set of texts.

    Attributes
    ----------
    centroids : ndarray float32 (n_clusters, n_features)
        Directions of the clusters, rows of length 1.
    scores : list of ndarray float32 (n_clusters, n_ff)
        Per layer: mean over a cluster's texts of the statistic per token.
    n_texts : ndarray int64 (n_clusters,)
        Training texts of every cluster.
    statistic, alpha, weighted
        What was counted; see `coreinfer.config.CoreConfig`.
    by : str
        What texts are compared by: "embedding", or "neurons", their own core neurons.
    embedder : str
        Name of the embedder; empty if `by` is "neurons".
    beta : float
        Share of a layer's neurons that a text is known by; 0 if `by` is "embedding".
    chat : bool
        Whether the texts were read through the model's chat template.
    fingerprint : int or None
        Fingerprint of the model file; None fits any model of these shapes.
    prior : PatchPrior or None
        What the texts taught for patches (`core="stable"` and `"similar"`).
    """

    centroids: np.ndarray
    scores: Sequence[np.ndarray]
    n_texts: np.ndarray
    statistic: str
    alpha: float = 0.4
    by: str = "embedding"
    embedder: str = ""
    beta: float = 0.0
    chat: bool = False
    fingerprint: int | None = None
    prior: PatchPrior | None = None
    weighted: bool = False

    def __post_init__(self) -> None:
        centroids = np.asarray(self.centroids, dtype=np.float32)
        if centroids.ndim != 2 or 0 in centroids.shape:
            raise ValueError(
                f"centroids have shape {centroids.shape}; expected (n_clusters, n_features)"
            )
        if not np.isfinite(centroids).all():
            raise ValueError("centroids hold a NaN or an infinity")
        lengths = np.linalg.norm(centroids, axis=1)
        if np.abs(lengths - 1).max() > 1e-3:
            at = int(np.abs(lengths - 1).argmax())
            raise ValueError(f"the centroid of cluster {at} has length {lengths[at]:g}; expected 1")
        if not 1 <= len(self.scores) <= MAX_LAYERS:
            raise ValueError(f"scores of {len(self.scores)} layers; expected 1 to {MAX_LAYERS}")
        n_ff = np.shape(self.scores[0])[-1] if np.ndim(self.scores[0]) == 2 else 0
        scores = [
            _checked_scores(i, layer, (len(centroids), n_ff)) for i, layer in enumerate(self.scores)
        ]
        n_texts = np.asarray(self.n_texts, dtype=np.int64)
        if n_texts.shape != (len(centroids),):
            raise ValueError(f"n_texts has shape {n_texts.shape}; expected ({len(centroids)},)")
        if n_texts.min() < 2:
            at = int(n_texts.argmin())
            raise ValueError(f"cluster {at} has {n_texts[at]} texts; expected at least 2")
        self._check_description(n_features=centroids.shape[1], n_neurons=len(scores) * n_ff)
        if self.prior is not None and (len(self.prior.h), self.prior.h[0].shape[1]) != (
            len(scores),
            n_ff,
        ):
            raise ValueError(
                f"the prior is of {len(self.prior.h)} layers with {self.prior.h[0].shape[1]} "
                f"neurons; expected {len(scores)} with {n_ff}"
            )
        object.__setattr__(self, "centroids", centroids)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "n_texts", n_texts)

    def _check_description(self, *, n_features: int, n_neurons: int) -> None:
        # What cannot be read back from a file cannot be made either.
        if self.statistic not in STATISTICS:
            known = ", ".join(STATISTICS)
            raise ValueError(f"statistic is {self.statistic!r}; expected one of {known}")
        number(vars(self), "alpha", 0, 1)
        number(vars(self), "beta", 0, 1)
        if self.by not in FEATURES:
            raise ValueError(f"by is {self.by!r}; expected one of {', '.join(FEATURES)}")
        if not isinstance(self.embedder, str) or len(self.embedder) > _MAX_NAME:
            raise ValueError(f"embedder is {self.embedder!r:.80}; expected a short name")
        if (self.by == "embedding") != bool(self.embedder):
            raise ValueError(f"embedder is {self.embedder!r} in clusters by {self.by}")
        for name, value in (("chat", self.chat), ("weighted", self.weighted)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; expected True or False")
        if self.by == "neurons" and n_features != n_neurons:
            raise ValueError(
                f"centroids have {n_features} features; expected one a neuron, {n_neurons}"
            )
        if self.by == "neurons" and self.beta == 0:
            raise ValueError("beta is 0; expected the share of neurons that a text is known by")
        if self.fingerprint is not None and not 0 <= self.fingerprint < 1 << 64:
            raise ValueError(f"fingerprint is {self.fingerprint}; expected 0 to 2**64 - 1")

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return len(self.centroids)

    @property
    def n_features(self) -> int:
        """Dimension of the embedding, or number of neurons."""
        return self.centroids.shape[1]

    @property
    def n_layer(self) -> int:
        """Layers of the model."""
        return len(self.scores)

    @property
    def n_ff(self) -> int:
        """Neurons of a layer."""
        return self.scores[0].shape[1]

    def nearest(self, features: np.ndarray) -> tuple[int, float]:
        """The cluster whose centroid has the largest cosine with `features`, and that cosine."""
        if np.shape(features) != (self.n_features,):
            raise ValueError(
                f"the prompt has features of shape {np.shape(features)}; these clusters have "
                f"{self.n_features}: was the embedder another one than {self.embedder!r}?"
            )
        cosines = self.centroids @ unit_rows(features[None, :], "the prompt")[0]
        cluster = int(cosines.argmax())
        return cluster, float(cosines[cluster].clip(-1, 1))  # rounding may pass either

    def check_fits(
        self, *, n_layer: int, n_ff: int, n_embd: int, fingerprint: int | None = None
    ) -> None:
        """ValueError unless the clusters belong to a model of this shape and fingerprint."""
        found = (self.n_layer, self.n_ff)
        if found != (n_layer, n_ff):
            raise ValueError(
                f"the clusters are for a model of {found[0]} layers with {found[1]} neurons; "
                f"this one has {n_layer} layers with {n_ff}: build them with this model"
            )
        if self.prior is not None and self.prior.n_embd != n_embd:
            raise ValueError(
                f"the clusters' prior is for embeddings of {self.prior.n_embd} numbers; this "
                f"model's have {n_embd}: build the clusters with this model"
            )
        if None not in (self.fingerprint, fingerprint) and self.fingerprint != fingerprint:
            raise ValueError(
                f"the clusters belong to another model or activation (fingerprint "
                f"{self.fingerprint:016x}, this one has {fingerprint:016x}); build "
                "them with this model"
            )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that other clusters do not have."""
        hashed = hashlib.blake2b(digest_size=8)
        prior = {} if self.prior is None else self.prior.arrays()
        for array in (self.centroids, self.n_texts, *self.scores, *prior.values()):
            hashed.update(np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()

    def for_any_model(self) -> Clusters:
        """The same clusters without the fingerprint, for another quantisation of the model."""
        return replace(self, fingerprint=None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to `path` (.npz): to a temporary file first, then renamed over the old one.

        Raises OSError if the system refuses (disk full, no permission); the old file then stays.
        """
        arrays = {"centroids": self.centroids, "n_texts": self.n_texts}
        arrays.update((f"scores_{i}", layer) for i, layer in enumerate(self.scores))
        if self.prior is not None:
            arrays |= self.prior.arrays()
        sidecar.save(path, "clusters", self._header(), arrays)

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "fingerprint": None if self.fingerprint is None else f"{self.fingerprint:016x}",
            "n_layer": self.n_layer,
            "n_ff": self.n_ff,
            "n_clusters": self.n_clusters,
            "n_features": self.n_features,
            "statistic": self.statistic,
            "alpha": self.alpha,
            "weighted": self.weighted,
            "by": self.by,
            "embedder": self.embedder,
            "beta": self.beta,
            "chat": self.chat,
            "patch_rows": 0 if self.prior is None else self.prior.n_rows,
            "n_embd": 0 if self.prior is None else self.prior.n_embd,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Clusters:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            The file holds no clusters, is damaged, or holds what cannot be right.
        OSError
            The file cannot be opened or read.
        """
        return sidecar.load(path, "file of clusters", _read, max_bytes=_MAX_FILE_BYTES)


def unit_rows(features: np.ndarray, name: str) -> np.ndarray:
    """Rows (n, n_features) scaled to length 1, float32; ValueError where that cannot be."""
    rows = np.asarray(features, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        at = int(np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))[0])
        raise ValueError(f"row {at} of the features of {name} has length {lengths[at, 0]:g}")
    return rows / lengths


def _checked_scores(i: int, layer: Any, shape: tuple[int, int]) -> np.ndarray:
    values = np.asarray(layer, dtype=np.float32)
    if values.shape != shape or not 1 <= shape[1] <= MAX_FF:
        raise ValueError(
            f"the scores of layer {i} have shape {values.shape}; expected (n_clusters, n_ff), "
            f"{shape[0]} clusters and the same n_ff in every layer"
        )
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(f"the scores of layer {i} are not all finite and at least 0")
    silent = np.flatnonzero(values.max(axis=1) == 0)
    if silent.size:
        raise ValueError(f"cluster {silent[0]} has no active neuron in layer {i}")
    return values


def _read(archive: Archive) -> Clusters:
    header = archive.header(FORMAT_NAME, FORMAT_VERSION)
    n_clusters = whole(header, "n_clusters", 1, MAX_CLUSTERS)
    n_features = whole(header, "n_features", 1, _MAX_FEATURES)
    n_layer = whole(header, "n_layer", 1, MAX_LAYERS)
    n_ff = whole(header, "n_ff", 1, MAX_FF)
    n_rows = whole(header, "patch_rows", 0, MAX_ROWS)
    n_embd = whole(header, "n_embd", min(n_rows, 1), MAX_EMBD)
    return Clusters(
        centroids=archive.matrix("centroids", np.float32, (n_clusters, n_features)),
        scores=[
            archive.matrix(f"scores_{i}", np.float32, (n_clusters, n_ff)) for i in range(n_layer)
        ],
        n_texts=archive.array("n_texts", np.int64, n_clusters),
        statistic=header.get("statistic"),
        alpha=number(header, "alpha", 0, 1),
        by=header.get("by"),
        embedder=header.get("embedder"),
        beta=number(header, "beta", 0, 1),
        chat=header.get("chat"),
        fingerprint=fingerprint_of(header),
        weighted=header.get("weighted"),
        prior=PatchPrior.read(archive, n_layer, n_rows, n_ff, n_embd) if n_rows else None,
    )
