"""PatchPrior: directions in which other texts move a model's FFNs, for the patch of a prompt.

Flows in: inputs and outputs of each layer's down projection for tokens of many texts, text by text.
Flows out: per layer a few rows that stand for all of them, small enough to lie in a file beside
clusters. A row is an input of the down projection and its output without bias; its weight is the
share of tokens it stands for: Σ weight h hᵀ is nearly the mean of h hᵀ / ‖h‖² over the tokens, of
all matrices of so few rows the nearest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PATCH_ROWS = 128  # by default: 256 or 512 gave nothing more on Qwen
MAX_ROWS = 4096
MAX_EMBD = 1 << 20


@dataclass(frozen=True, eq=False)
class PatchPrior:
    """What a patch learns from beside the prompt's own tokens.

    Attributes
    ----------
    h : tuple of ndarray float16 (n_rows, n_ff)
        Per layer: inputs of the down projection.
    y : tuple of ndarray float16 (n_rows, n_embd)
        Their outputs, without bias.
    weights : tuple of ndarray float32 (n_rows,)
        The share of tokens that each row stands for.
    """

    h: Sequence[np.ndarray]
    y: Sequence[np.ndarray]
    weights: Sequence[np.ndarray]

    def __post_init__(self) -> None:
        h, y, weights = (
            tuple(map(np.ascontiguousarray, arrays)) for arrays in (self.h, self.y, self.weights)
        )
        if not h or not len(h) == len(y) == len(weights):
            raise ValueError(
                f"a prior of {len(h)} inputs, {len(y)} outputs and {len(weights)} weights; "
                "expected one of each for every layer"
            )
        for i in range(len(h)):
            for name, found, kind, shape in (
                ("h", h[i], np.float16, np.shape(h[0])),
                ("y", y[i], np.float16, (len(h[0]), np.shape(y[0])[-1])),
                ("weights", weights[i], np.float32, (len(h[0]),)),
            ):
                if found.shape != shape or found.ndim != len(shape) or found.dtype != kind:
                    raise ValueError(
                        f"{name} of layer {i} is {found.dtype} of shape {found.shape}; expected "
                        f"{np.dtype(kind)} {shape}"
                    )
                if not np.isfinite(found).all():
                    raise ValueError(f"{name} of layer {i} holds a NaN or an infinity")
            if (weights[i] < 0).any():
                raise ValueError(f"layer {i} has a weight below 0")
        object.__setattr__(self, "h", h)
        object.__setattr__(self, "y", y)
        object.__setattr__(self, "weights", weights)

    @property
    def n_rows(self) -> int:
        """Rows of every layer."""
        return len(self.h[0])

    @property
    def n_embd(self) -> int:
        """Outputs of a down projection."""
        return self.y[0].shape[1]

    def arrays(self) -> dict[str, np.ndarray]:
        """By the names that they have in a file."""
        named: dict[str, np.ndarray] = {}
        for i, (h, y, weights) in enumerate(zip(self.h, self.y, self.weights, strict=True)):
            named |= {f"patch_h_{i}": h, f"patch_y_{i}": y, f"patch_weights_{i}": weights}
        return named

    @classmethod
    def read(cls, archive: Any, n_layer: int, n_rows: int, n_ff: int, n_embd: int) -> PatchPrior:
        """What `arrays` named, from a `sidecar.Archive`; ValueError for what does not fit."""
        layers = range(n_layer)
        return cls(
            [archive.matrix(f"patch_h_{i}", np.float16, (n_rows, n_ff)) for i in layers],
            [archive.matrix(f"patch_y_{i}", np.float16, (n_rows, n_embd)) for i in layers],
            [archive.array(f"patch_weights_{i}", np.float32, n_rows) for i in layers],
        )


class PatchPriorBuilder:
    """Gathers tokens of texts, never holding more than a few times `n_rows` rows a layer.

    Once there are more, the rows are turned to their principal directions (by the Gram matrix of
    the inputs) and the strongest `n_rows` of them kept.
    """

    _FULL = 4  # times n_rows

    def __init__(self, n_layer: int, n_rows: int) -> None:
        self._n_rows = n_rows
        self._n_tokens = 0
        self._rows: list[list[np.ndarray]] = [[] for _ in range(n_layer)]  # h and y side by side

    def add(self, layer: int, h: np.ndarray, y: np.ndarray) -> None:
        """Tokens of a text: inputs (n, n_ff) and outputs without bias (n, n_embd), float32.

        The same number for every layer; tokens without an active neuron count as none.
        """
        if layer == 0:
            self._n_tokens += len(h)
        norms = np.linalg.norm(h, axis=1, keepdims=True)
        active = norms[:, 0] > 0
        rows = self._rows[layer]
        rows.append(np.concatenate([h, y], axis=1)[active] / norms[active])
        if sum(map(len, rows)) > self._FULL * self._n_rows:
            rows[:] = [_strongest(np.concatenate(rows), h.shape[1], self._n_rows)]

    def build(self, n_ff: int) -> PatchPrior:
        """The prior of all that was added."""
        h, y, weights = [], [], []
        for gathered in self._rows:
            rows = _strongest(np.concatenate(gathered), n_ff, self._n_rows)
            # float16 has its best range near 1; what is taken out of a row goes into its weight.
            scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(1e-30))
            rows = np.pad(rows / scale, ((0, self._n_rows - len(rows)), (0, 0)))
            share = np.zeros(self._n_rows, np.float32)
            share[: len(scale)] = scale[:, 0] ** 2 / np.float32(max(1, self._n_tokens))
            h.append(rows[:, :n_ff].astype(np.float16))
            y.append(rows[:, n_ff:].astype(np.float16))
            weights.append(share)
        return PatchPrior(h, y, weights)


def _strongest(rows: np.ndarray, n_ff: int, n_rows: int) -> np.ndarray:
    """At most n_rows rows whose inputs, the first n_ff columns, have nearly the same Gram sum."""
    if len(rows) <= n_rows:
        return rows
    inputs = rows[:, :n_ff]
    _, vectors = np.linalg.eigh((inputs @ inputs.T).astype(np.float64))
    return vectors[:, -n_rows:].T.astype(np.float32) @ rows
