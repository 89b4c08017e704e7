"""ClusterLookup: which neurons decode a prompt, by its nearest cluster.

Flows in: the prompt's text, or its neuron scores where the clusters compare those or where they are
blended in. Flows out: a `CoreSet` that names the cluster and its similarity.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from . import _core
from .clusters import Clusters
from .config import CoreConfig
from .core_sets import CoreSet
from .embedders import AnyEmbedder, Embedder, as_embedder

_TRIAL = "A text."  # that an embedder is tried on before the first prompt


def top_neurons(scores: np.ndarray, k: int) -> np.ndarray:
    """Ascending int32 indices of the k highest scores (n_ff,); ties to the lower index, 0 never."""
    least = max(np.partition(scores, scores.size - k)[scores.size - k], 0)
    above = np.flatnonzero(scores > least)
    if least == 0:
        return above.astype(np.int32)
    tied = np.flatnonzero(scores == least)[: k - above.size]
    return np.sort(np.concatenate([above, tied])).astype(np.int32)


def core_neurons(scores: Sequence[np.ndarray], beta: float) -> np.ndarray:
    """1 for the share `beta` of highest score in each layer, else 0: bool (n_layer * n_ff,)."""
    marks = np.zeros((len(scores), len(scores[0])), dtype=bool)
    sizes = _core.core_sizes(beta, n_layer=marks.shape[0], n_ff=marks.shape[1])
    for mark, score, k in zip(marks, scores, sizes, strict=True):
        mark[top_neurons(score, k)] = True
    return marks.ravel()


def blend_scores(own: np.ndarray, n_tokens: int, cluster: np.ndarray, weight: float) -> np.ndarray:
    """`weight` × own score per token + (1 - weight) × the cluster's, float32 (n_ff,).

    Both are means over tokens of the same statistic. Means of ranks were measured too: they kept
    less of what the two scores agree on, and decoding with them was further from dense.
    """
    own_weight = np.float32(weight / n_tokens)
    return own_weight * own + np.float32(1 - weight) * cluster


class ClusterLookup:
    """Clusters with their embedder.

    Parameters
    ----------
    clusters
        What was built for the model.
    embedder : str, path, callable or None
        Instead of the one that the clusters name; see `coreinfer.embedders.as_embedder`. It is
        loaded and tried by `prepare`, or when it is first needed.

    Attributes
    ----------
    embed_seconds, lookup_seconds : float
        What the last `nearest` took, embedding the text, and the rest, `choose` since then
        included.
    """

    def __init__(self, clusters: Clusters, embedder: AnyEmbedder | None = None) -> None:
        self.clusters = clusters
        self.embedder = embedder
        self.embed_seconds = self.lookup_seconds = 0.0
        self._embed: Embedder | None = None

    def prepare(self) -> None:
        """Load the embedder, if there is need of one, and try it; again after it has failed.

        ImportError if it needs what is not installed, ValueError if it cannot be loaded or makes
        no vectors, or vectors of another dimension than the clusters' centroids.
        """
        if self.clusters.by != "embedding" or self._embed is not None:
            return
        named = self.clusters.embedder
        embed = as_embedder(named if self.embedder is None else self.embedder)
        n_features = embed([_TRIAL]).shape[1]
        if n_features != self.clusters.n_features:
            raise ValueError(
                f"the embedder {embed.name} makes vectors of {n_features} numbers, and these "
                f"clusters are of {self.clusters.n_features}; expected the embedder that they were "
                f"built with, {named}, or clusters that were built with this one"
            )
        self._embed = embed

    def nearest(self, text: str, own: Sequence[np.ndarray] = ()) -> tuple[int, float]:
        """The cluster of a prompt and its cosine.

        By what the prompt says or, where clusters are of core neurons, by its own scores per layer,
        float32 (n_ff,).
        """
        self.prepare()
        self.embed_seconds = 0.0
        begun = time.perf_counter()
        if self._embed is None:
            features = core_neurons(own, self.clusters.beta)
        else:
            features = self._embed([text])[0]
            self.embed_seconds = time.perf_counter() - begun
        found = self.clusters.nearest(features)
        self.lookup_seconds = time.perf_counter() - begun - self.embed_seconds
        return found

    def choose(
        self,
        core: CoreConfig,
        nearest: tuple[int, float],
        own: Sequence[np.ndarray] = (),
        n_tokens: int = 0,
    ) -> CoreSet:
        """The neurons for a prompt.

        Parameters
        ----------
        core
            `gamma`, `blend`, `layers` and `first_layer` are looked at.
        nearest
            What `nearest` found.
        own : list of ndarray float32 (n_ff,)
            The prompt's own scores per layer, where `blend` wants them.
        n_tokens
            Prompt tokens behind `own`.
        """
        begun = time.perf_counter()
        clusters = self.clusters
        cluster, similarity = nearest
        scores = [layer[cluster] for layer in clusters.scores]
        if core.blend > 0:
            scores = [
                blend_scores(o, n_tokens, c, core.blend) for o, c in zip(own, scores, strict=True)
            ]
        first, last = core.layer_range(clusters.n_layer) or (0, clusters.n_layer)
        sizes = _core.core_sizes(
            core.gamma,
            n_layer=clusters.n_layer,
            n_ff=clusters.n_ff,
            layers=(first, last),
            first_layer=core.first_layer,
        )
        layers: list[np.ndarray | None] = [None] * clusters.n_layer
        layers[first:last] = map(top_neurons, scores[first:last], sizes)
        chosen = CoreSet(
            layers=layers,
            n_ff=clusters.n_ff,
            scores=scores,
            statistic=clusters.statistic,
            alpha=clusters.alpha,
            weighted=clusters.weighted,
            beta=core.gamma,
            n_tokens=n_tokens,
            cluster=cluster,
            cluster_similarity=similarity,
            fingerprint=clusters.fingerprint,
        )
        self.lookup_seconds += time.perf_counter() - begun
        return chosen
