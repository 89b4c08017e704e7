"""CoreSet: the neurons that decoding keeps, layer by layer, as a plain value that can be filed.

A set comes out of `Llama.core_set`, goes back in through `Llama(core=...)` or `set_core_set`, and
is saved as `.npz` (never pickled): one int32 array a layer, optionally the float32 scores and the
float16 factors of the patch, and a JSON header with the model's fingerprint. Every index and value
is checked when a file is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import sidecar
from .config import MAX_PATCH_RANK, STATISTICS
from .sidecar import MAX_CLUSTERS, MAX_FF, MAX_LAYERS, Archive, fingerprint_of, number, whole

FORMAT_NAME = "coreinfer core set"
FORMAT_VERSION = 1
_MAX_EMBD = 1 << 20
_MAX_FILE_BYTES = 1 << 30


Patch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
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
    weighted : bool
        Whether activations were weighted by the norms of the down projection's columns.
    patch : list of (ndarray float16 (rank, k), ndarray float16 (n_embd, rank)) or None
        Per layer the low-rank part by which the k kept neurons answer for the dropped ones:
        y += out @ (in @ h); None for a layer without, an empty list if no layer has one.
    """

    layers: Sequence[np.ndarray | None]
    n_ff: int
    scores: Sequence[np.ndarray | None] = field(default_factory=list)
    statistic: str = ""
    alpha: float = 0.0
    beta: float = 0.0
    n_tokens: int = 0
    stability: float | None = None
    cluster: int | None = None
    cluster_similarity: float | None = None
    fingerprint: int | None = None
    weighted: bool = False
    patch: Sequence[Patch | None] = field(default_factory=list)

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
        if not isinstance(self.weighted, bool):
            raise ValueError(f"weighted is {self.weighted!r}; expected True or False")
        if len(self.patch) not in (0, len(layers)):
            raise ValueError(
                f"a core set of {len(layers)} layers has a patch for {len(self.patch)}; expected "
                "one pair of matrices a layer, or none at all"
            )
        patch = [
            _checked_patch(i, factors, layer)
            for i, (factors, layer) in enumerate(zip(self.patch, layers, strict=False))
        ]
        object.__setattr__(self, "patch", patch if any(patch) else [])
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "scores", scores)

    def __repr__(self) -> str:
        facts = [f"{len(self.layers)} layers", f"{100 * self.kept:.0f} % of {self.n_ff} neurons"]
        if self.statistic:
            facts.append(f"{self.statistic}{' weighted' if self.weighted else ''}")
        if self.patch_rank:
            facts.append(f"patch of rank {self.patch_rank}")
        if self.cluster is not None:
            facts.append(f"cluster {self.cluster}")
        if self.stability is not None:
            facts.append(f"stability {self.stability:.2f}")
        return f"<CoreSet: {', '.join(facts)}>"

    @property
    def sizes(self) -> list[int]:
        """Neurons kept per layer; n_ff where a layer stays dense."""
        return [self.n_ff if layer is None else len(layer) for layer in self.layers]

    @property
    def patch_rank(self) -> int:
        """The largest rank among the layers' patches; 0 without any."""
        return max((len(factors[0]) for factors in self.patch if factors), default=0)

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
                f"the core set belongs to another model or activation (fingerprint "
                f"{self.fingerprint:016x}, this one has {fingerprint:016x}); make "
                "one with this model"
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
        for i, factors in enumerate(self.patch):
            if factors is not None:
                arrays[f"patch_in_{i}"], arrays[f"patch_out_{i}"] = factors
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
            "weighted": self.weighted,
            "patched_layers": [i for i, factors in enumerate(self.patch) if factors is not None],
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


def _checked_patch(i: int, factors: Any, layer: np.ndarray | None) -> Patch | None:
    if factors is None:
        return None
    if layer is None:
        raise ValueError(f"layer {i} stays dense but has a patch; expected none")
    inner, outer = (np.ascontiguousarray(factor) for factor in factors)
    shapes_fit = (
        inner.ndim == 2
        and outer.ndim == 2
        and inner.shape[1] == len(layer)
        and outer.shape[1] == inner.shape[0]
        and 1 <= inner.shape[0] <= MAX_PATCH_RANK
        and 1 <= outer.shape[0] <= _MAX_EMBD
    )
    if not shapes_fit or inner.dtype != np.float16 or outer.dtype != np.float16:
        raise ValueError(
            f"the patch of layer {i} is {inner.dtype} {inner.shape} and {outer.dtype} "
            f"{outer.shape}; expected float16 (rank, {len(layer)}) and (n_embd, rank)"
        )
    if not (np.isfinite(inner).all() and np.isfinite(outer).all()):
        raise ValueError(f"the patch of layer {i} holds NaN or Inf")
    return inner, outer


def _statistic(header: dict[str, Any]) -> str:
    value = header.get("statistic", "")
    if value not in ("", *STATISTICS):
        known = ", ".join(STATISTICS)
        raise ValueError(f"statistic is {value!r}; expected one of {known}, or nothing")
    return value


def _layer_list(header: dict[str, Any], name: str, n_layer: int) -> set[int]:
    value = header.get(name)
    if (
        not isinstance(value, list)
        or any(type(i) is not int or not 0 <= i < n_layer for i in value)
        or len(set(value)) != len(value)
    ):
        raise ValueError(
            f"{name} is {value!r}; expected a list of different layers from 0 to {n_layer - 1}"
        )
    return set(value)


def _read_patch(archive: Archive, i: int, layer: np.ndarray | None) -> Patch:
    k = 0 if layer is None else len(layer)
    inner = archive.rows(f"patch_in_{i}", np.float16, k, MAX_PATCH_RANK)
    return inner, archive.rows(f"patch_out_{i}", np.float16, len(inner), _MAX_EMBD)


def _read(archive: Archive) -> CoreSet:
    header = archive.header(FORMAT_NAME, FORMAT_VERSION)
    n_layer = whole(header, "n_layer", 1, MAX_LAYERS)
    n_ff = whole(header, "n_ff", 1, MAX_FF)
    dense = _layer_list(header, "dense_layers", n_layer)
    layers = [
        None if i in dense else archive.array(f"layer_{i}", np.int32, n_ff) for i in range(n_layer)
    ]
    scored = any(f"scores_{i}" in archive for i in range(n_layer))
    scores = [
        archive.array(f"scores_{i}", np.float32, n_ff) if f"scores_{i}" in archive else None
        for i in range(n_layer if scored else 0)
    ]
    patched = _layer_list({"patched_layers": [], **header}, "patched_layers", n_layer)
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
        weighted=header.get("weighted", False),
        patch=[
            _read_patch(archive, i, layers[i]) if i in patched else None
            for i in range(n_layer if patched else 0)
        ],
    )
