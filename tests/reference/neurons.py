"""The method's definitions in NumPy: core neurons of a token, scores over a prompt, core sets,
and the numbers that compare core sets. One function a definition, with loops where they are
clearer. All of them look at `h`, the activations that enter the down projection.
"""

from __future__ import annotations

import math

import numpy as np

STATISTICS = ("count", "count_gate", "count_abs", "flock")


def round_half_up(x: float) -> int:
    """round(x) of every definition here: floor(x + 0.5), in float64."""
    return math.floor(x + 0.5)


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest values, ascending; among equal values the lower index wins."""
    order = np.argsort(-np.asarray(values, np.float64), kind="stable")
    return np.sort(order[:k])


def token_core(row: np.ndarray, alpha: float) -> np.ndarray:
    """Token-wise core neurons: of the P positive entries the max(1, round(alpha * P)) largest.

    Returns ascending indices; none where no entry is positive.
    """
    n_positive = int((row > 0).sum())
    if n_positive == 0:
        return np.empty(0, np.int64)
    return largest(row, max(1, round_half_up(alpha * n_positive)))


def count(h: np.ndarray, alpha: float) -> np.ndarray:
    """For each neuron the number of rows (tokens) that have it among their core neurons.

    h : (n_tokens, n_ff) -> int64 (n_ff,). On act(gate) this is `count_gate`, on |h| `count_abs`.
    """
    counts = np.zeros(h.shape[1], np.int64)
    for row in h:
        counts[token_core(row, alpha)] += 1
    return counts


def flock(h: np.ndarray) -> np.ndarray:
    """Sum over tokens of h_t^2 / |h_t|^2, float64 (n_ff,); rows of zeros are skipped."""
    scores = np.zeros(h.shape[1], np.float64)
    for row in np.asarray(h, np.float64):
        norm = float(row @ row)
        if norm > 0:
            scores += row * row / norm
    return scores


def statistic_scores(
    statistic: str, h: np.ndarray, act: np.ndarray, alpha: float, weight: np.ndarray | None = None
) -> np.ndarray:
    """Score of every neuron of one layer.

    Parameters
    ----------
    statistic : one of STATISTICS
    h : (n_tokens, n_ff) activations entering the down projection
    act : (n_tokens, n_ff) act(gate) alone (for ungated FFNs the same as h)
    alpha : share of a token's positive (non-zero) activations that count; unused by flock
    weight : optional (n_ff,) norms of the down projection's columns: activations are multiplied
        by them first, so that a neuron is judged by what it adds to the residual stream
    """
    scale = 1.0 if weight is None else np.asarray(weight, np.float64)
    if statistic == "count":
        return count(h * scale, alpha)
    if statistic == "count_gate":
        return count(act * scale, alpha)
    if statistic == "count_abs":
        return count(np.abs(h) * scale, alpha)
    if statistic == "flock":
        return flock(h * scale)
    raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}")


def core_set(scores: np.ndarray, beta: float) -> np.ndarray:
    """The max(1, round(beta * N)) neurons of highest score, ascending; ties go to the lower
    index, and neurons of score zero are never core (so the set may be smaller, even empty)."""
    chosen = largest(scores, max(1, round_half_up(beta * len(scores))))
    return chosen[np.asarray(scores)[chosen] > 0]


def core_sizes(beta: float, n_layer: int, n_ff: int, first_layer: float = 1.0) -> list[int]:
    """How many neurons each layer keeps, beta * N on average: in the first `first_layer` times as
    many, at most all, and no more than leaves the others half their share."""
    if n_layer == 1:
        return [max(1, round_half_up(beta * n_ff))]
    first = min(beta * first_layer, beta + (n_layer - 1) * beta / 2, 1.0)
    rest = (n_layer * beta - first) / (n_layer - 1)
    return [max(1, round_half_up(share * n_ff)) for share in [first] + [rest] * (n_layer - 1)]


def core_sets(
    statistic: str,
    h: np.ndarray,
    act: np.ndarray,
    alpha: float,
    beta: float,
    layers: tuple[int, int] | None = None,
) -> list[np.ndarray | None]:
    """Core set of every layer in [first, last), None (dense) for the others.

    h, act : (n_layer, n_tokens, n_ff)
    """
    first, last = layers if layers is not None else (0, len(h))
    return [
        core_set(statistic_scores(statistic, h[i], act[i], alpha), beta)
        if first <= i < last
        else None
        for i in range(len(h))
    ]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Shared neurons / size of the (larger) set; two empty sets are the same set: 1."""
    larger = max(len(a), len(b))
    return len(np.intersect1d(a, b)) / larger if larger else 1.0


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Shared neurons / neurons in either; two empty sets are the same set: 1."""
    union = len(np.union1d(a, b))
    return len(np.intersect1d(a, b)) / union if union else 1.0


def core_similarity(a: list[np.ndarray | None], b: list[np.ndarray | None]) -> float:
    """Core-neuron similarity of two texts: overlap averaged over the layers with core sets."""
    return float(
        np.mean(
            [overlap(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        )
    )


def stability_prefix(n_tokens: int) -> int:
    """Largest power of two that is at most half of the prompt's tokens (n_tokens >= 2)."""
    return 1 << ((n_tokens // 2).bit_length() - 1)


def stability(
    statistic: str,
    h: np.ndarray,
    act: np.ndarray,
    alpha: float,
    beta: float,
    layers: tuple[int, int] | None = None,
) -> float | None:
    """Similarity of the prefix's core sets and the prompt's, made free of chance:
    (overlap - chance) / (1 - chance), where random sets of their sizes overlap by chance (beta,
    unless neurons are silent). None for prompts of fewer than two tokens and for beta = 1."""
    n_tokens = h.shape[1]
    if n_tokens < 2 or beta >= 1:
        return None
    p = stability_prefix(n_tokens)
    prefix = core_sets(statistic, h[:, :p], act[:, :p], alpha, beta, layers)
    whole = core_sets(statistic, h, act, alpha, beta, layers)
    pairs = [(len(a), len(b)) for a, b in zip(prefix, whole, strict=True) if a is not None]
    chance = np.mean([min(pair) for pair in pairs]) / h.shape[2]
    return (core_similarity(prefix, whole) - chance) / (1 - chance)


def ridge_patch(
    h: np.ndarray,
    y: np.ndarray,
    kept: np.ndarray,
    w_down: np.ndarray,
    ridge: float,
    prior: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    prior_weight: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """What kept neurons can say of dropped ones, by ridge regression over sampled tokens.

    h : (m, n_ff) inputs and y : (m, n_embd) outputs of a down projection w_down (n_embd, n_ff).
    prior : more rows of both, and the share of `prior_weight` * m tokens that each stands for.
    Returns the correction of full rank, (n_embd, k), and the fitted outputs, (rows, n_embd).
    """
    m = len(h)
    scale = 1 / np.linalg.norm(h, axis=1, keepdims=True)
    if prior is not None:
        more_h, more_y, weights = prior
        h, y = np.concatenate([h, more_h]), np.concatenate([y, more_y])
        scale = np.concatenate([scale, np.sqrt(weights * prior_weight * m)[:, None]])
    inner = h[:, kept] * scale
    lost = (y - h[:, kept] @ w_down[:, kept].T) * scale
    gram = inner @ inner.T
    mu = ridge * np.trace(gram[:m, :m]) / m
    solution = np.linalg.solve(gram + mu * np.eye(len(gram)), lost)
    return solution.T @ inner, gram @ solution
