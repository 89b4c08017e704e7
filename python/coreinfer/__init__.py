"""CoreInfer for GGUF models: read a prompt dense, decode with the neurons it activates most.

>>> from coreinfer import Llama, resolve_model
>>> llm = Llama(resolve_model("smollm2"), core="stable")
>>> llm("The capital of France is", max_tokens=8)["choices"][0]["text"]

Names are loaded when they are first used, so that `import coreinfer.tokenizer` needs no compiled
extension.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._core import GGUFError, NumericError
    from .clusters import Clusters
    from .config import CoreConfig
    from .core_sets import CoreSet
    from .llama import Llama
    from .models import ModelFetchError, resolve_model
    from .similarity import SimilarityClusters, build_clusters
    from .types import LlamaState

    __version__: str

_HOME = {
    "Llama": "llama",
    "Clusters": "clusters",
    "CoreConfig": "config",
    "CoreSet": "core_sets",
    "LlamaState": "types",
    "GGUFError": "_core",
    "NumericError": "_core",
    "ModelFetchError": "models",
    "SimilarityClusters": "similarity",
    "build_clusters": "similarity",
    "resolve_model": "models",
}

__all__ = [
    "Clusters",
    "CoreConfig",
    "CoreSet",
    "GGUFError",
    "Llama",
    "LlamaState",
    "ModelFetchError",
    "NumericError",
    "SimilarityClusters",
    "__version__",
    "build_clusters",
    "resolve_model",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("coreinfer-cpp")
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
