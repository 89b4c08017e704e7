"""Loading: the engine of a model file, with room planned for what will decode.

Flows in: a file, how to load it, and the core setting. Flows out: a `_core.Engine`. Where memory is
limited, and a GPU's always is, what decodes decides how much of it the dense weights may take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from . import _core
from .config import CoreConfig, LoadConfig
from .core_sets import CoreSet
from .tuning import Tuning, fastest


def load_engine(
    file: _core.GgufFile,
    config: LoadConfig,
    core: CoreConfig | CoreSet,
    find_tuning: Callable[[], Tuning | None] = lambda: None,
) -> _core.Engine:
    """The engine of a file; `find_tuning` gives the table that `core="auto"` will go by.

    MemoryError where a limit is too low, naming one that is enough.
    """
    limited = config.memory_limit or config.n_gpu_layers
    if not (limited and isinstance(core, CoreConfig) and core.mode == "auto"):
        return _load(file, config, core)
    # Where the dense weights stay, any of the tuned settings may decode, or exact mode, which needs
    # less beside them than a patched core set without. Where they do not, the limit must hold for
    # what then decodes.
    tuning = find_tuning()
    choices = [] if tuning is None else tuning.choices(core.max_kl)
    dense, alone = core.in_mode("exact"), core.in_mode("stable")
    if choices:
        configs = [choice.config for choice in choices]
        patch = max(int(c.patch) for c in configs)
        dense = CoreConfig(beta=max(c.beta for c in configs), patch=patch)
    choice = fastest([c for c in choices if not c.config.start], None, 0.0)
    if choice is not None:
        alone = choice.config
    with contextlib.suppress(MemoryError):
        engine = _load(file, config, dense)
        if engine.ffn_resident:
            return engine
        del engine
    return _load(file, config, alone)


def _load(file: _core.GgufFile, config: LoadConfig, core: CoreConfig | CoreSet) -> _core.Engine:
    return _core.Engine(
        file,
        n_threads=config.n_threads or 0,
        f32_activations=config.f32_activations,
        activation=config.activation or "",
        memory_limit=config.memory_limit or 0,
        core_share=_core_share(core),
        needs_dense=isinstance(core, CoreConfig) and (core.mode == "exact" or core.start > 0),
        n_ctx=config.n_ctx,
        n_batch=config.n_batch,
        type_k=config.type_k,
        type_v=config.type_v,
        samples=_samples(core),
        n_gpu_layers=config.n_gpu_layers,
        main_gpu=config.main_gpu,
        vram_limit=config.vram_limit or 0,
    )


def _core_share(core: CoreConfig | CoreSet) -> float:
    """Share of the FFN weights that decoding will want beside the dense ones."""
    if isinstance(core, CoreSet):
        return core.kept
    return {"off": 0.0, "similar": core.gamma}.get(core.mode, core.beta)


def _samples(core: CoreConfig | CoreSet) -> int:
    """FFN samples that prefills keep for a patch, or exact mode until they are counted."""
    if not isinstance(core, CoreConfig):
        return 0
    if core.mode == "exact":
        return _core.EXACT_SAMPLES
    return _core.PATCH_SAMPLES if core.mode in ("stable", "similar") and core.patch else 0
