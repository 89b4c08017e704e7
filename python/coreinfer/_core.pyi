"""
The C++ core: GGUF files, engines, sessions. Users want coreinfer.Llama instead.
"""

from collections.abc import Callable, Mapping, Sequence
import os
from typing import Annotated

import numpy
from numpy.typing import NDArray

from coreinfer._core import testing as testing


class GGUFError(ValueError):
    """A model file is malformed, or needs what is not supported."""

class NumericError(ArithmeticError):
    """
    NaN or Inf in an activation, or a layer without activity; names layer and token.
    """

class TensorInfo:
    """Name, type, shape and place of one tensor of a file."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> str:
        """GGUF's name of the element type, for example 'Q4_K'."""

    @property
    def shape(self) -> tuple:
        """Dimensions in GGUF's order: shape[0] is the length of a row."""

    @property
    def nbytes(self) -> int: ...

    @property
    def offset(self) -> int:
        """Bytes from the start of its file."""

    @property
    def part(self) -> int:
        """Index of its file in GgufFile.files."""

    def __repr__(self) -> str: ...

class GgufFile:
    """
    A GGUF model file (or split set), checked and mapped read-only.

    Raises GGUFError when it is malformed, OSError when it cannot be read.
    """

    def __init__(self, path: str | bytes | os.PathLike) -> None: ...

    @property
    def path(self) -> object: ...

    @property
    def version(self) -> int: ...

    @property
    def files(self) -> list: ...

    @property
    def metadata(self) -> dict:
        """
        Key -> value: int, float, bool, str (bytes where not UTF-8), NumPy arrays of
        numbers, lists of strings. The same dict on every access.
        """

    @property
    def tensors(self) -> list: ...

    @property
    def fingerprint(self) -> int: ...

    def dequantize(self, name: str) -> object:
        """
        The tensor as float32 of shape (rows, cols); dimensions above the first are rows.

        Raises GGUFError when it is missing or of an unsupported type, OSError when the file
        was truncated or written to since it was opened.
        """

    def check_unchanged(self) -> None:
        """
        Raise OSError when the file was truncated or written to since it was opened.
        """

class Engine:
    """A loaded model on a backend, constant; shared by sessions."""

    def __init__(self, source: object, *, n_threads: int = 0, f32_activations: bool = False, activation: str = '', memory_limit: int = 0, core_share: float = 0.0, dense: bool | None = None, n_ctx: int | None = None, n_batch: int = 512, type_k: str = 'f16', type_v: str = 'f16', samples: int = 0, n_gpu_layers: int = 0, main_gpu: int = 0, vram_limit: int = 0, progress: Callable[[float], None] | None = None) -> None:
        """
        Loads a GGUF file (a path: str, bytes or os.PathLike; or a GgufFile). memory_limit leaves room for a Session of n_ctx, n_batch, type_k and type_v that keeps so many FFN samples (n_ctx None: for none), and for core weights of core_share, beside all dense ones (dense True), without them (False), or as there is room. activation stands in for what the file says ("": nothing). Raises GGUFError for a malformed or unsupported file, OSError where it cannot be read and MemoryError for a limit that is too low.
        """

    @property
    def gguf(self) -> object: ...

    @property
    def config(self) -> dict: ...

    @property
    def backend(self) -> dict: ...

    @property
    def fingerprint(self) -> int: ...

    @property
    def weight_bytes(self) -> int:
        """Weight bytes that one dense decode step reads."""

    @property
    def ffn_bytes(self) -> int:
        """The part of weight_bytes that is FFN weights."""

    @property
    def ffn_resident(self) -> bool:
        """
        Whether dense FFN weights stay in memory, or come in a layer at a time.
        """

    def ffn_down_bias(self, layer: int) -> NDArray[numpy.float32] | None:
        """float32 (n_embd,), or None where the architecture has none."""

    @property
    def load_seconds(self) -> float: ...

    @property
    def n_vocab(self) -> int: ...

    @property
    def n_layer(self) -> int: ...

    @property
    def n_ctx_train(self) -> int: ...

def fingerprint(file: GgufFile, activation: str = '') -> int:
    """The fingerprint of an Engine of this file and activation."""

def memory() -> dict:
    """Resident bytes of this process, now and at most: rss, peak_rss."""

class PatchPrior:
    """What other texts taught of a model's FFNs; see coreinfer.patch_prior."""

    def __init__(self, h: Sequence[Annotated[NDArray, dict(shape=(None, None), order='C', device='cpu', writable=False)]], y: Sequence[Annotated[NDArray, dict(shape=(None, None), order='C', device='cpu', writable=False)]], weights: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]]) -> None:
        """
        Per layer: float16 (rows, n_ff), float16 (rows, n_embd) and float32 (rows,). They are not copied: hand in tuples.
        """

class CoreSet:
    """Which neurons of which layers decode a text; a plain value."""

    def __init__(self, layers: Sequence[Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None], scores: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]] | None = None, *, n_ff: int, statistic: str = '', alpha: float = 0.0, beta: float = 0.0, n_tokens: int = 0, weighted: bool = False, patch: Sequence[tuple[Annotated[NDArray, dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray, dict(shape=(None, None), order='C', device='cpu', writable=False)]] | None] | None = None) -> None:
        """
        layers: per layer ascending int32 indices, or None where it stays dense. patch: per layer float16 (rank, k) and (n_embd, rank), or None.
        """

    @property
    def layers(self) -> list:
        """Per layer: int32 (k,), ascending, or None (dense)."""

    @property
    def scores(self) -> list:
        """Per layer: float32 (n_ff,); empty when handed in."""

    @property
    def patch(self) -> list:
        """
        Per layer: float16 (rank, k) and (n_embd, rank), or None; empty without any.
        """

    @property
    def n_ff(self) -> int: ...

    @property
    def statistic(self) -> str: ...

    @property
    def alpha(self) -> float: ...

    @property
    def weighted(self) -> bool: ...

    @property
    def beta(self) -> float: ...

    @property
    def n_tokens(self) -> int: ...

    def same_neurons(self, other: CoreSet) -> bool: ...

class Sampler:
    """Logits to a token; seeded; remembers tokens for penalties."""

    def __init__(self, *, temperature: float = 0.800000011920929, top_k: int = 40, top_p: float = 0.949999988079071, min_p: float = 0.05000000074505806, typical_p: float = 1.0, repeat_penalty: float = 1.0, frequency_penalty: float = 0.0, presence_penalty: float = 0.0, penalty_last_n: int = 64, logit_bias: Mapping[int, float] = {}, seed: int = 0) -> None: ...

    def accept(self, token: int) -> None: ...

    def sample(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> int: ...

EXACT_SAMPLES: int = 48

PATCH_SAMPLES: int = 128

def core_sizes(beta: float, *, n_layer: int, n_ff: int, layers: tuple[int, int] | None = None, first_layer: float = 1.0) -> list[int]:
    """
    Neurons that each layer that takes part keeps: the share beta on average, in the model's first layer first_layer times as many.
    """

class Session:
    """One text of one caller: cache, neuron scores, decode weights."""

    def __init__(self, engine: Engine, *, n_ctx: int = 0, n_batch: int = 512, type_k: str = 'f16', type_v: str = 'f16') -> None: ...

    @property
    def n_ctx(self) -> int: ...

    @property
    def n_batch(self) -> int: ...

    @property
    def n_past(self) -> int: ...

    @property
    def n_dense(self) -> int:
        """Leading positions that dense weights wrote."""

    @property
    def tokens(self) -> list[int]: ...

    def reusable(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], statistic: str | None = None, alpha: float = 0.4, weighted: bool = False, samples: int = 0) -> int:
        """
        How many leading ids a prefill of tokens may keep; always leaves the last to run.
        """

    def keep(self, n: int) -> None:
        """Forgets all positions from n on."""

    def reset(self) -> None: ...

    def prefill(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], *, statistic: str | None = None, alpha: float = 0.4, weighted: bool = False, samples: int = 0, progress: Callable[[int, int], None] | None = None, beta: float | None = None, layers: tuple[int, int] | None = None, first_layer: float = 1.0) -> None:
        """
        Appends int32 tokens with the dense weights, counting for the statistic if given. With what the select that follows will be given, weights that are not resident are gathered as they pass by.
        """

    def select(self, *, beta: float, layers: tuple[int, int] | None = None, first_layer: float = 1.0) -> CoreSet:
        """The neurons of highest score, core_sizes of them."""

    def stability(self, *, beta: float, layers: tuple[int, int] | None = None) -> float | None: ...

    def samples(self, layer: int) -> tuple[NDArray[numpy.float32], NDArray[numpy.float32]]:
        """
        What the prefill kept of its last tokens: inputs (n, n_ff) and outputs (n, n_embd) of the layer's down projection, float32.
        """

    def set_core(self, core_set: CoreSet | None) -> None:
        """
        Compacts and decodes with these neurons from now on; None: the dense weights.
        """

    def fit_patch(self, prior: PatchPrior | None = None, *, rank: int = 64, decay: float = 1.0, ridge: float = 0.3, prior_weight: float = 2.0) -> None:
        """
        Lets the kept neurons of the present core set answer for the dropped ones, as learned from the prompt's samples, and from a prior; core_set then carries the patch.
        """

    @property
    def patch_bytes(self) -> int: ...

    @property
    def core_set(self) -> CoreSet | None: ...

    @property
    def decode_weight_bytes(self) -> int: ...

    def decode(self, token: int, sampler: Sampler | None = None) -> None:
        """One token; in exact mode a copy of the sampler draws the drafts."""

    def set_exact(self, *, beta: float = 0.4, layers: tuple[int, int] | None = None, first_layer: float = 1.0, max_drafts: int = 8, core: bool = True, text: bool = True, paced: bool = True) -> None:
        """
        From now on decode gives the dense weights' logits and uses core neurons to draft.
        """

    def end_exact(self) -> None: ...

    @property
    def exact(self) -> bool: ...

    @property
    def expected(self) -> int | None:
        """The token that exact mode expects next and has looked at, or None."""

    @property
    def pace(self) -> dict | None:
        """
        Exact mode: expected gain over dense decoding by source of drafts, or None.
        """

    def replay(self, *, statistic: str | None = None, alpha: float = 0.4, weighted: bool = False, samples: int = 0) -> None:
        """
        Reads again, dense, what was decoded with core weights or is not counted and sampled.
        """

    def verify(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> NDArray[numpy.float32]:
        """(n, n_vocab) float32 logits through the decode weights."""

    def score(self, continuation: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> NDArray[numpy.float32]:
        """
        (n, n_vocab) float32 ln p before each token of the continuation, row 0 from the present logits, the rest through the decode weights.
        """

    def logits(self) -> NDArray[numpy.float32]: ...

    def logprobs(self, top_n: int, token: int) -> tuple[float, list[tuple[int, float]]]:
        """ln p(token) and the top_n (id, ln p)."""

    def sample(self, sampler: Sampler) -> int:
        """Draws from the last logits; the sampler remembers the token."""

    def save_state(self) -> bytes: ...

    def load_state(self, data: bytes) -> None: ...

    @property
    def timings(self) -> dict: ...

    @property
    def kv_bytes(self) -> int: ...
