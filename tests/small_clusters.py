"""Texts on two topics, an embedder that tells them apart with no package, clusters made by hand."""

from __future__ import annotations

import json

import numpy as np

from coreinfer import Clusters
from coreinfer.patch_prior import PatchPrior
from make_synthetic_model import make_tiny_model

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


def write_texts(path, field: str) -> str:
    """TEXTS as JSON lines."""
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in TEXTS))
    return str(path)


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


def make_clusters_by_neurons() -> Clusters:
    """Some for any model of 3 layers with 512 neurons; they need no embedder."""
    scores = [np.ones((3, 512), np.float32)] * 3
    return make_clusters(scores=scores, embedder="", by="neurons", beta=0.2, fingerprint=None,
                         centroids=np.eye(3, 3 * 512))  # fmt: skip


def make_prior(n_layer: int = 2, n_ff: int = 64, **changes) -> PatchPrior:
    rng = np.random.default_rng(2)
    values = {
        "h": [rng.random((4, n_ff)).astype(np.float16) for _ in range(n_layer)],
        "y": [rng.random((4, 8)).astype(np.float16) for _ in range(n_layer)],
        "weights": [np.full(4, 0.25, np.float32)] * n_layer,
    }
    return PatchPrior(**{**values, **changes})


def make_tiny_chat(path) -> str:
    """A llama of 3 layers with 512 neurons and a chat template."""
    make_tiny_model(path, "llama", "F32", extra_metadata={"tokenizer.chat_template": TEMPLATE})
    return str(path)
