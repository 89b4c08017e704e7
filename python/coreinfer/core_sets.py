"""CoreSet: the neurons that decoding keeps, layer by layer, as a plain value that can be filed.

A set comes out of `Llama.core_set`, goes back in through `Llama(core=...)` or `set_core_set`, and
is saved as `.npz` (never pickled): one int32 array a layer, optionally the float32 scores, and a
JSON header with the model's fingerprint. Every index is checked when a file is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import sidecar
from .config import STATISTICS
from .sidecar import MAX_CLUSTERS, MAX_FF, MAX_LAYERS, Archive, fingerprint_of, number, whole

FORMAT_NAME = "coreinfer core set"
FORMAT_VERSION = 1
_MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class CoreSet:
    """Core neurons of every layer.

    Attributes
    ----------
    layers : list of ndarray int32 or None
        Ascending neuron indices per layer; None where the layer stays dense.
    n_ff : int
        Neurons a layer has before selection.
    scores : list of ndarray float32 (n_ff,) or None
        The statistic summed over the prompt, per layer; an empty list if the set was handed in
        without, None for a layer that took no part.
    statistic, alpha, beta
        How the set was chosen; "" and 0 if it was made by hand.
    n_tokens : int
        Prompt tokens behind the scores.
    stability : float or None
        1 where the first half of the prompt already chose the same set, 0 where the overlap is
        what chance would give; None if it is not known.
    cluster, cluster_similarity : int and float, or None
        The cluster that chose the set, and the cosine of the prompt to it; None if none did.
    fingerprint : int or None
        Fingerprint of the model file the set belongs to; None fits any model of these shapes.
    """

    layers: Sequence[np.ndarray | None]
    n_ff: int
    scores: Sequence[np.ndarray | None] = field(default_factory=list, repr=False)
    statistic: str = ""
    alpha: float = 0.0
    beta: float = 0.0
    n_tokens: int = 0
    stability: float | None = None
    cluster: int | None = None
    cluster_similarity: float | None = None
    fingerprint: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise ValueError(f"a core set has {len(self.layers)} layers; expected 1 to 4096")
        if not 1 <= int(self.n_ff) <= MAX_FF:
            raise ValueError(f"n_ff is {self.n_ff}; expected 1 to {MAX_FF}")
        layers = [_checked_layer(i, layer, self.n_ff) for i, layer in enumerate(self.layers)]
        if len(self.scores) not in (0, len(layers)):
            raise ValueError(
                f"a core set of {len(layers)} layers has scores for {len(self.scores)}; "
                "expected one array a layer, or none at all"
            )
        scores = [_checked_scores(i, score, self.n_ff) for i, score in enumerate(self.scores)]
        # What cannot be read back from a file cannot be made either.
        given = vars(self)
        number(given, "alpha", 0, 1)
        number(given, "beta", 0, 1)
        _statistic(given)
        if self.fingerprint is not None and not 0 <= self.fingerprint < 1 << 64:
            raise ValueError(f"fingerprint is {self.fingerprint}; expected 0 to 2**64 - 1")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "scores", scores)

    @property
    def sizes(self) -> list[int]:
        """Neurons kept per layer; n_ff where a layer stays dense."""
        return [self.n_ff if layer is None else len(layer) for layer in self.layers]

    @property
    def kept(self) -> float:
        """Share of all neurons that is kept, 0 to 1."""
        return sum(self.sizes) / (self.n_ff * len(self.layers))

    def same_neurons(self, other: CoreSet) -> bool:
        """Whether both keep exactly the same neurons."""
        return len(self.layers) == len(other.layers) and all(
            (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
            for a, b in zip(self.layers, other.layers, strict=True)
        )

    def similarity(self, other: CoreSet) -> float:
        """Shared neurons ÷ the larger set's size, averaged over the layers both select in."""
        pairs = [
            (a, b)
            for a, b in zip(self.layers, other.layers, strict=True)
            if a is not None and b is not None
        ]
        if not pairs:
            raise ValueError("the two core sets select in no common layer")
        shares = [len(np.intersect1d(a, b)) / max(len(a), len(b)) for a, b in pairs]
        return float(np.mean(shares))

    def check_fits(self, *, n_layer: int, n_ff: int, fingerprint: int | None = None) -> None:
        """ValueError unless the set belongs to a model of this shape and fingerprint."""
        found = (len(self.layers), self.n_ff)
        if found != (n_layer, n_ff):
            raise ValueError(
                f"the core set is for a model of {found[0]} layers with {found[1]} neurons; "
                f"this one has {n_layer} layers with {n_ff}"
            )
        if None not in (self.fingerprint, fingerprint) and self.fingerprint != fingerprint:
            raise ValueError(
                f"the core set belongs to another model (fingerprint {self.fingerprint:016x}, "
                f"this one has {fingerprint:016x}); make one with this model"
            )

    def for_any_model(self) -> CoreSet:
        """The same neurons without the fingerprint, for another quantisation of the model."""
        return replace(self, fingerprint=None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to `path` (.npz): to a temporary file first, then renamed over the old one.

        Raises OSError if the system refuses (disk full, no permission); the old file then stays.
        """
        arrays = {}
        for i, layer in enumerate(self.layers):
            if layer is not None:
                arrays[f"layer_{i}"] = layer
        for i, score in enumerate(self.scores):
            if score is not None:
                arrays[f"scores_{i}"] = score
        sidecar.save(path, "core set", self._header(), arrays)

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "fingerprint": None if self.fingerprint is None else f"{self.fingerprint:016x}",
            "n_layer": len(self.layers),
            "n_ff": int(self.n_ff),
            "dense_layers": [i for i, layer in enumerate(self.layers) if layer is None],
            "statistic": self.statistic,
            "alpha": self.alpha,
            "beta": self.beta,
            "n_tokens": int(self.n_tokens),
            "stability": self.stability,
            "cluster": self.cluster,
            "cluster_similarity": self.cluster_similarity,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CoreSet:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            The file is no core set, is damaged, or holds indices that cannot be right.
        OSError
            The file cannot be opened or read.
        """
        return sidecar.load(path, "core set", _read, max_bytes=_MAX_FILE_BYTES)


def _checked_layer(i: int, layer: Any, n_ff: int) -> np.ndarray | None:
    if layer is None:
        return None
    indices = np.asarray(layer)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(
            f"layer {i} is {indices.dtype} of shape {indices.shape}; expected integers (k,)"
        )
    if len(indices) == 0:
        raise ValueError(f"layer {i} keeps no neuron; expected at least one")
    if int(indices.min()) < 0 or int(indices.max()) >= n_ff:
        bad = int(indices.max()) if int(indices.max()) >= n_ff else int(indices.min())
        raise ValueError(f"layer {i} names neuron {bad}; expected 0 to {n_ff - 1}")
    indices = indices.astype(np.int32)
    if np.any(np.diff(indices) <= 0):
        raise ValueError(f"the neurons of layer {i} are not strictly ascending")
    indices.flags.writeable = False
    return indices


def _checked_scores(i: int, score: Any, n_ff: int) -> np.ndarray | None:
    if score is None or np.size(score) == 0:
        return None
    values = np.asarray(score, dtype=np.float32)
    if values.shape != (n_ff,):
        raise ValueError(f"the scores of layer {i} have shape {values.shape}; expected ({n_ff},)")
    return values


def _statistic(header: dict[str, Any]) -> str:
    value = header.get("statistic", "")
    if value not in ("", *STATISTICS):
        known = ", ".join(STATISTICS)
        raise ValueError(f"statistic is {value!r}; expected one of {known}, or nothing")
    return value


def _dense_layers(header: dict[str, Any], n_layer: int) -> set[int]:
    value = header.get("dense_layers")
    if (
        not isinstance(value, list)
        or any(type(i) is not int or not 0 <= i < n_layer for i in value)
        or len(set(value)) != len(value)
    ):
        raise ValueError(
            f"dense_layers is {value!r}; expected a list of different layers from 0 to "
            f"{n_layer - 1}"
        )
    return set(value)


def _read(archive: Archive) -> CoreSet:
    header = archive.header(FORMAT_NAME, FORMAT_VERSION)
    n_layer = whole(header, "n_layer", 1, MAX_LAYERS)
    n_ff = whole(header, "n_ff", 1, MAX_FF)
    dense = _dense_layers(header, n_layer)
    layers = [
        None if i in dense else archive.array(f"layer_{i}", np.int32, n_ff) for i in range(n_layer)
    ]
    scored = any(f"scores_{i}" in archive for i in range(n_layer))
    scores = [
        archive.array(f"scores_{i}", np.float32, n_ff) if f"scores_{i}" in archive else None
        for i in range(n_layer if scored else 0)
    ]
    stability, similarity = header.get("stability"), header.get("cluster_similarity")
    cluster = header.get("cluster")
    return CoreSet(
        layers=layers,
        n_ff=n_ff,
        scores=scores,
        statistic=_statistic(header),
        alpha=number(header, "alpha", 0, 1),
        beta=number(header, "beta", 0, 1),  # 0, as for alpha, in a set made by hand
        n_tokens=whole(header, "n_tokens", 0, 1 << 62),
        stability=None if stability is None else number(header, "stability", -1, 1),
        cluster=None if cluster is None else whole(header, "cluster", 0, MAX_CLUSTERS - 1),
        cluster_similarity=(
            None if similarity is None else number(header, "cluster_similarity", -1, 1)
        ),
        fingerprint=fingerprint_of(header),
    )
