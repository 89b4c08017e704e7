"""Loading: the engine of a model file, with room planned for what will decode.

Flows in: a file, how to load it, and the core setting. Flows out: a `_core.Engine`. Where memory is
limited, and a GPU's always is, what decodes decides how much of it the dense weights may take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import _core
from .auto import Auto
from .clusters import Clusters
from .config import CoreConfig, LoadConfig
from .core_sets import CoreSet
from .tuning import Tuning


def load_engine(
    file: _core.GgufFile,
    config: LoadConfig,
    core: CoreConfig | CoreSet,
    find_tuning: Callable[[], Tuning | None] = lambda: None,
    clusters: Clusters | None = None,
) -> _core.Engine:
    """The engine of a file; by `find_tuning`'s table and `clusters` `core="auto"` will go.

    MemoryError where a limit is too low, naming one that is enough.
    """
    limited = config.memory_limit or config.n_gpu_layers
    if not (limited and isinstance(core, CoreConfig) and core.mode == "auto"):
        needed = isinstance(core, CoreConfig) and (core.mode == "exact" or core.start > 0)
        return _load(file, config, [core], dense=True if needed else None)
    tuning = find_tuning()
    with_dense, without = (
        Auto(core, tuning, ffn_resident=resident, clusters=clusters).settings
        for resident in (True, False)
    )
    try:
        return _load(file, config, with_dense, dense=True)
    except MemoryError:
        if _keeps_all(file, config):
            raise
    return _load(file, config, without, dense=False)


def _keeps_all(file: _core.GgufFile, config: LoadConfig) -> bool:
    """Whether the dense weights stay whatever the plan: some layers are the GPU's, without a limit.

    A second plan would have less room than auto then asks for.
    """
    n_layer = file.metadata[f"{file.metadata['general.architecture']}.block_count"]
    return config.memory_limit is None and 0 < config.n_gpu_layers < n_layer


def _load(
    file: _core.GgufFile,
    config: LoadConfig,
    cores: Sequence[CoreConfig | CoreSet],
    *,
    dense: bool | None,
) -> _core.Engine:
    """An engine with room for any of `cores`, beside the `dense` weights, or as there is room."""
    return _core.Engine(
        file,
        n_threads=config.n_threads or 0,
        f32_activations=config.f32_activations,
        activation=config.activation or "",
        memory_limit=config.memory_limit or 0,
        core_share=max(map(_core_share, cores)),
        dense=dense,
        n_ctx=config.n_ctx,
        n_batch=config.n_batch,
        type_k=config.type_k,
        type_v=config.type_v,
        samples=_samples(cores),
        n_gpu_layers=config.n_gpu_layers,
        main_gpu=config.main_gpu,
        vram_limit=config.vram_limit or 0,
    )


def _core_share(core: CoreConfig | CoreSet) -> float:
    """Share of the FFN weights that decoding will want beside the dense ones."""
    return core.kept if isinstance(core, CoreSet) else core.share


def _samples(cores: Sequence[CoreConfig | CoreSet]) -> int:
    """FFN samples that prefills keep for a patch, and exact mode, beside them, until counted."""
    configs = [core for core in cores if isinstance(core, CoreConfig)]
    patched = any(core.mode in ("stable", "similar") and core.patch for core in configs)
    exact = any(core.mode == "exact" for core in configs)
    return _core.PATCH_SAMPLES * patched + _core.EXACT_SAMPLES * exact
