"""GGUF helpers for the oracle: metadata, tensors dequantised by the `gguf` package, and the
distances between distributions that the goldens are stated in.

The dequantisation is the package's own, so the oracle shares no unpacking code with the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize


class GgufTensors:
    """Metadata and tensors of one GGUF file; tensors are dequantised when asked for."""

    def __init__(self, path: str | Path) -> None:
        self._reader = GGUFReader(str(path))
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._tensors)

    def keys(self) -> list[str]:
        """Metadata keys in file order."""
        return list(self._reader.fields)

    def field(self, key: str, default: Any = None) -> Any:
        """Metadata value of `key`, or `default` where the file does not have it."""
        found = self._reader.get_field(key)
        return default if found is None else found.contents()

    def tensor_type(self, name: str) -> str:
        """Name of a tensor's type, e.g. ``"Q4_K"``."""
        return self._tensors[name].tensor_type.name

    def load(self, name: str) -> np.ndarray:
        """A tensor as float32, rows first: GGUF's (columns, rows) becomes (rows, columns)."""
        return dequantise(self._tensors[name])


def dequantise(tensor: ReaderTensor) -> np.ndarray:
    """Values of a tensor as float32 in NumPy order."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    data = (
        tensor.data if tensor.tensor_type in plain else dequantize(tensor.data, tensor.tensor_type)
    )
    return np.ascontiguousarray(data, np.float32).reshape(shape)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities over the last axis, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p || q) over the last axis, in nats, of natural-log probabilities."""
    log_p, log_q = log_p.astype(np.float64), log_q.astype(np.float64)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def kl20(top_ids: np.ndarray, top_log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL of the goldens: the listed outcomes plus all the rest as one, mean over positions.

    Parameters
    ----------
    top_ids : (n, k) token ids of the reference's likeliest outcomes
    top_log_p : (n, k) their natural-log probabilities
    log_q : (n, n_vocab) natural-log probabilities under test
    """
    log_p = np.asarray(top_log_p, np.float64)
    log_q = np.take_along_axis(log_q.astype(np.float64), np.asarray(top_ids), axis=-1)
    p, q = np.exp(log_p), np.exp(log_q)
    tiny = np.finfo(np.float64).tiny
    rest_p = np.maximum(1 - p.sum(axis=-1), tiny)
    rest_q = np.maximum(1 - q.sum(axis=-1), tiny)
    return float(np.mean((p * (log_p - log_q)).sum(axis=-1) + rest_p * np.log(rest_p / rest_q)))


def top1_agreement(reference_ids: np.ndarray, log_q: np.ndarray) -> float:
    """Share of positions whose arg-max is the reference's; ties go to the lower id."""
    return float(np.mean(log_q.argmax(axis=-1) == np.asarray(reference_ids)))
