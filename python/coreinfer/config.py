"""Every parameter once: name, default, help text and valid range.

`Llama`'s keyword arguments take their defaults from these dataclasses, and the command line makes
its flags from the same fields, so the two cannot drift apart. Values are checked when a config is
made; what depends on a model (number of layers, its context) is checked where the model is known.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

CORE_MODES = ("auto", "off", "stable", "similar", "exact")
STATISTICS = ("count", "count_gate", "count_abs", "flock")
# Which fields of CoreConfig mean something in which modes.
FIELDS_OF_MODES = {
    ("auto",): ("max_kl",),
    ("stable", "similar", "auto"): ("refresh",),
    ("exact", "auto"): ("max_drafts",),
    ("stable", "exact"): ("alpha", "beta", "statistic", "weighted"),
    ("stable", "similar"): ("patch", "prior", "start"),
    ("similar",): ("gamma", "blend"),
    ("stable", "similar", "exact"): ("layers", "first_layer"),
}
CORE_PRESETS = ("paper",)  # names of whole CoreConfigs, beside the modes
PATCH_RANK = 64  # of `patch=True`
MAX_PATCH_RANK = 1024
CACHE_TYPES = ("f32", "f16", "q8_0")

DEFAULT_CORE_MODE = "auto"  # what `Llama` and the command line do unless asked
CHAT_TEMPERATURE = 0.2  # chat answers are drawn closer to the arg-max than completions
RANDOM_SEED = 0xFFFFFFFF  # this seed asks for a new one from the operating system

LayerRange = tuple[int, int | None]


@dataclass(frozen=True)
class Spec:
    """What is known of one parameter beside its default.

    `kind` is one of int, float, str, text, bool, layers, bias, size, patch; `low` and `high` are
    inclusive bounds unless `low_open`; `flag` is the command-line name where it differs from the
    field's.
    """

    help: str
    kind: str
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    choices: tuple[str, ...] | None = None
    optional: bool = False
    flag: str | None = None
    metavar: str | None = None

    def expected(self) -> str:
        """The valid values in words, for error messages."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        noun = {"int": "an integer", "float": "a number"}.get(self.kind, f"a {self.kind}")
        if self.low is not None and self.high is not None:
            bounds = f"{_plain(self.low)}, {_plain(self.high)}]"
            return f"{noun} in {'(' if self.low_open else '['}{bounds}"
        if self.low is not None:
            return f"{noun} {'above' if self.low_open else 'of at least'} {_plain(self.low)}"
        return noun


def _plain(bound: float) -> str:
    """A bound as people write it: all digits of an integer."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def parameter(default: Any, help: str, kind: str, **rest: Any) -> Any:
    """A dataclass field that carries its `Spec`."""
    return field(default=default, metadata={"spec": Spec(help, kind, **rest)})


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name} is {value!r}; expected {expected}")


def _checked(name: str, value: Any, spec: Spec) -> Any:
    """`value` as the parameter's own type, or ValueError with what was expected and found."""
    if value is None and spec.optional:
        return None
    if spec.choices:
        if not isinstance(value, str) or value not in spec.choices:
            raise _wrong(name, value, spec.expected())
        return value
    if spec.kind == "bool":
        if not isinstance(value, bool):
            raise _wrong(name, value, "True or False")
        return value
    if spec.kind == "text":
        if not isinstance(value, str) or not value:
            raise _wrong(name, value, "some text")
        return value
    if spec.kind == "layers":
        return _checked_layers(name, value)
    if spec.kind == "bias":
        return _checked_bias(name, value)
    if spec.kind == "size":
        return parse_size(value, name)
    if spec.kind == "patch":
        return _checked_patch(name, value)
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value) if spec.kind == "int" else float(value)
    except (TypeError, ValueError, OverflowError):
        raise _wrong(name, value, spec.expected()) from None
    too_low = spec.low is not None and (number <= spec.low if spec.low_open else number < spec.low)
    too_high = spec.high is not None and number > spec.high
    if too_low or too_high or not math.isfinite(number):
        finite = math.isfinite(number) or math.isnan(number)
        expected = spec.expected()
        raise _wrong(name, value, expected if finite else f"{expected}, and a finite one")
    return number


def _checked_layers(name: str, value: Any) -> LayerRange:
    if isinstance(value, str):
        return parse_layers(value, name)
    try:
        first, last = value
        first = operator.index(first)
        last = None if last is None else operator.index(last)
    except (TypeError, ValueError):
        raise _wrong(name, value, "(first, last) with last excluded") from None
    if first < 0 or (last is not None and last <= first):
        raise _wrong(name, value, "(first, last) with 0 <= first < last")
    return first, last


def _checked_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "a mapping from token id to a number")
    try:
        bias = {
            # JSON has ids as text.
            int(token) if isinstance(token, str) else operator.index(token): float(amount)
            for token, amount in value.items()
        }
    except (TypeError, ValueError):
        raise _wrong(name, value, "a mapping from token id to a number") from None
    if any(math.isnan(amount) for amount in bias.values()):
        raise _wrong(name, value, "no NaN among the numbers")
    return bias


def _checked_patch(name: str, value: Any) -> int:
    """The rank that is meant: True, "on" or a number; 0 for False and "off"."""
    words: dict[Any, Any] = {"on": True, "off": False}
    given = words.get(value.lower(), value) if isinstance(value, str) else value
    if isinstance(given, bool):
        return PATCH_RANK if given else 0
    try:
        rank = int(given) if isinstance(given, str) else operator.index(given)
    except (TypeError, ValueError):
        rank = -1
    if not 0 <= rank <= MAX_PATCH_RANK:
        raise _wrong(name, value, f"on, off or a rank from 1 to {MAX_PATCH_RANK}")
    return rank


def parse_layers(text: str, name: str = "layers") -> LayerRange:
    """`"6:26"`, `":20"`, `"4:"` → (first, last), last excluded, None for "up to the last layer"."""
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError
        pair = (int(first) if first.strip() else 0, int(last) if last.strip() else None)
    except ValueError:
        raise _wrong(name, text, "FIRST:LAST, for example 6:26, :20 or 4:") from None
    return _checked_layers(name, pair)


_UNITS = {"": 1, "B": 1}
_UNITS |= {p + "B": 1000**i for i, p in enumerate(["K", "M", "G", "T"], 1)}
_UNITS |= {p + "IB": 1024**i for i, p in enumerate(["K", "M", "G", "T"], 1)}


def parse_size(value: Any, name: str = "size") -> int:
    """Bytes from a number or from text as `"2GiB"`, `"500 MB"`."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(value))
    unit = _UNITS.get(match[2].upper()) if match else None
    size = round(float(match[1]) * unit) if match and unit else 0
    if isinstance(value, (bool, float)) or not 0 < size < 2**63:
        raise _wrong(name, value, "a number of bytes, for example 2GiB or 500MB")
    return size


def _looked_at(mode: Any) -> set[str]:
    """The fields of CoreConfig that mean something in a mode."""
    return {"mode"}.union(*(names for modes, names in FIELDS_OF_MODES.items() if mode in modes))


class Checked:
    """Base of the configs: checks every field by its `Spec` and stores the checked value."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _checked(f.name, getattr(self, f.name), f.metadata["spec"])
            object.__setattr__(self, f.name, value)


@dataclass(frozen=True)
class CoreConfig(Checked):
    """How decoding chooses its core neurons.

    `CoreConfig(beta=0.8)` is stability-guided decoding with 80 % of the neurons; `mode="similar"`
    is similarity-guided, with `gamma` and `blend` and the statistic of the clusters; `mode="off"`
    is dense decoding. A field that the mode does not look at keeps its default.
    """

    mode: str = parameter(
        "stable",
        "decode dense (off), with the prompt's own core neurons (stable), with those of the "
        "cluster of texts that the prompt is nearest to (similar), or dense with core neurons as "
        "a draft that the dense weights verify (exact: the text of off, never another); auto: "
        "what `coreinfer tune` measured to be within --max-kl, else exact",
        "str",
        choices=CORE_MODES,
        flag="--core",
    )
    alpha: float = parameter(
        0.4,
        "share of a token's positive activations that count as its core neurons",
        "float",
        low=0,
        high=1,
        low_open=True,
    )
    beta: float = parameter(
        0.4,
        "share of a layer's neurons that decoding keeps",
        "float",
        low=0,
        high=1,
        low_open=True,
    )
    statistic: str = parameter(
        "flock", "how neurons are ranked over the prompt", "str", choices=STATISTICS
    )
    layers: LayerRange | None = parameter(
        None,
        "layers that take part, last excluded (default: all); the others stay dense",
        "layers",
        optional=True,
        metavar="A:B",
    )
    first_layer: float = parameter(
        2.0,
        "times as many neurons in the model's first layer, on which all others build, as the "
        "share says, and fewer in the others, so that the total stays (1: the same in all)",
        "float",
        low=1,
        high=1024,
    )
    gamma: float = parameter(
        0.4,
        "share of a layer's neurons that decoding keeps of a cluster's",
        "float",
        low=0,
        high=1,
        low_open=True,
    )
    # Measured on Qwen with prompts of 16 to 128 tokens: 0.1 to 0.3 nats nearer to dense than the
    # cluster alone, and up to 64 tokens nearer than the prompt's neurons alone
    # (tools/FIGURES.md).
    blend: float = parameter(
        0.5,
        "weight of the prompt's own neuron scores beside its cluster's; 0 is the cluster alone",
        "float",
        low=0,
        high=1,
    )
    max_kl: float = parameter(
        0.05,
        "how far auto may be from dense decoding: mean KL divergence in nats",
        "float",
        low=0,
    )
    start: int = parameter(
        0,
        "tokens of the answer that the dense weights decode, before the neurons are chosen by the "
        "prompt and by them",
        "int",
        low=0,
        high=1 << 26,
        metavar="N",
    )
    refresh: int | None = parameter(
        None,
        "read every N generated tokens again, dense, and choose the neurons anew, of a cluster's "
        "with these tokens' own scores blended in (default: never)",
        "int",
        low=1,
        high=1 << 26,
        optional=True,
        metavar="N",
    )
    max_drafts: int = parameter(
        8, "tokens that exact mode drafts at most before a verification", "int", low=0, high=15
    )
    weighted: bool = parameter(
        False,
        "weigh activations by the norms of the down projection's columns before ranking neurons",
        "bool",
    )
    patch: bool | int = parameter(
        True,
        f"let the kept neurons answer for the dropped ones: on (rank {PATCH_RANK}), off or a rank",
        "patch",
        metavar="RANK",
    )
    prior: bool = parameter(
        True,
        "learn the patch also from the texts of the clusters file, where it keeps some",
        "bool",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        looked_at = _looked_at(self.mode)
        for f in dataclasses.fields(self):
            default = _checked(f.name, f.default, f.metadata["spec"])
            if f.name not in looked_at and getattr(self, f.name) != default:
                self._refuse(f.name, getattr(self, f.name))

    @classmethod
    def paper(cls, beta: float = 0.4, mode: str = "stable") -> CoreConfig:
        """The settings of the CoreInfer paper (arXiv 2410.18311), whatever the defaults become.

        Its beta, which is its gamma too, is 0.2 for extraction and question answering, 0.4 for
        translation. For "similar", clusters are to be built with `statistic="count"`.
        """
        settings = {
            "mode": mode,
            "alpha": 0.4,
            "beta": beta,
            "gamma": beta,
            "statistic": "count",
            "weighted": False,
            "patch": False,
            "prior": False,
            "blend": 0.0,
            "start": 0,
            "refresh": None,
            "layers": None,
            "first_layer": 1.0,
        }
        return cls.of_fields(settings)

    @classmethod
    def preset(cls, name: str, mode: str = "stable") -> CoreConfig:
        """The settings of a name in `CORE_PRESETS`, for a mode that chooses core neurons."""
        if name not in CORE_PRESETS:
            raise _wrong("preset", name, f"one of {', '.join(CORE_PRESETS)}")
        if mode not in ("stable", "similar"):
            raise ValueError(
                f"preset is {name!r}; it needs core='stable' or core='similar', but core is "
                f"{mode!r}"
            )
        return cls.paper(mode=mode)

    @classmethod
    def of(cls, core: str | CoreConfig) -> CoreConfig:
        """A config from a mode's or preset's name or a config; anything else is a ValueError."""
        if isinstance(core, cls):
            return core
        if isinstance(core, str) and core in CORE_PRESETS:
            return cls.preset(core)
        if isinstance(core, str) and core in CORE_MODES:
            return cls(mode=core)
        names = ", ".join((*CORE_MODES, *CORE_PRESETS))
        raise _wrong("core", core, f"one of {names}, a CoreConfig or a CoreSet")

    def changed(self, **fields: Any) -> CoreConfig:
        """With other values of some fields; ValueError for one that this mode does not look at."""
        looked_at = _looked_at(self.mode)
        for f in dataclasses.fields(self):
            if f.name in fields and f.name not in looked_at:
                self._refuse(f.name, fields[f.name])
        return dataclasses.replace(self, **fields)

    def _refuse(self, name: str, value: Any) -> NoReturn:
        modes = next(modes for modes, names in FIELDS_OF_MODES.items() if name in names)
        wanted = " or ".join(f"core={mode!r}" for mode in modes)
        raise ValueError(f"{name} is {value!r}; it needs {wanted}, but core is {self.mode!r}")

    @property
    def share(self) -> float:
        """Share of a layer's neurons that decode beside the dense weights, or instead of them."""
        return {"off": 0.0, "similar": self.gamma}.get(self.mode, self.beta)

    def in_mode(self, mode: str) -> CoreConfig:
        """In another mode, with all that both look at."""
        names = _looked_at(mode) & _looked_at(self.mode) - {"mode"}
        return CoreConfig(mode=mode, **{name: getattr(self, name) for name in names})

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> CoreConfig:
        """From a mode and other fields, without those that it does not look at."""
        looked_at = _looked_at(fields["mode"])
        return cls(**{name: value for name, value in fields.items() if name in looked_at})

    def check_fits(self, *, n_layer: int, n_ff: int) -> None:
        """ValueError where this is no setting for a model of this shape."""
        self.layer_range(n_layer)
        name = {"off": None, "similar": "gamma"}.get(self.mode, "beta")
        # As the core set's own check: 1 / 49 of 49 is less than 1.
        if name is not None and getattr(self, name) * n_ff < 1 - 1e-9:
            raise ValueError(
                f"{name} is {getattr(self, name):g}, which is less than one of a layer's {n_ff} "
                f"neurons; expected at least 1 / {n_ff}"
            )

    def layer_range(self, n_layer: int) -> tuple[int, int] | None:
        """The range for a model of `n_layer` layers, None for all; ValueError if outside."""
        if self.layers is None:
            return None
        first, last = self.layers
        last = n_layer if last is None else last
        if not first < last <= n_layer:
            raise _wrong(
                "layers", f"{first}:{last}", f"0 <= first < last <= {n_layer}, the model's layers"
            )
        return first, last


@dataclass(frozen=True)
class SamplingConfig(Checked):
    """How the next token is drawn from the logits."""

    temperature: float = parameter(
        0.8, "softness of the choice; 0 takes the likeliest token", "float", low=0, flag="--temp"
    )
    top_k: int = parameter(40, "keep the K likeliest tokens; 0 or less keeps all", "int")
    top_p: float = parameter(
        0.95,
        "keep the likeliest tokens of total probability P",
        "float",
        low=0,
        high=1,
        low_open=True,
    )
    min_p: float = parameter(
        0.05, "drop tokens less likely than P times the likeliest", "float", low=0, high=1
    )
    typical_p: float = parameter(
        1.0,
        "keep the most typical tokens of total probability P",
        "float",
        low=0,
        high=1,
        low_open=True,
    )
    repeat_penalty: float = parameter(
        1.0,
        "divide the logits of recent tokens by this; 1 is none",
        "float",
        low=0,
        low_open=True,
    )
    frequency_penalty: float = parameter(
        0.0, "subtract this for every recent occurrence of a token", "float"
    )
    presence_penalty: float = parameter(0.0, "subtract this if a token occurred recently", "float")
    penalty_last_n: int = parameter(
        64, "how many recent tokens the penalties look at", "int", low=0, high=1 << 20
    )
    logit_bias: Mapping[int, float] | None = parameter(
        None, "amounts to add to the logits of some tokens", "bias", optional=True
    )

    def sampler_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `coreinfer._core.Sampler`, but for the seed."""
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arguments["top_k"] = min(max(0, self.top_k), 2**31 - 1)
        arguments["logit_bias"] = dict(self.logit_bias or {})
        return arguments

    @property
    def has_penalties(self) -> bool:
        """Whether the recent tokens change the logits at all."""
        neutral = (1.0, 0.0, 0.0)
        penalties = (self.repeat_penalty, self.frequency_penalty, self.presence_penalty)
        return self.penalty_last_n > 0 and penalties != neutral


@dataclass(frozen=True)
class LoadConfig(Checked):
    """How a model is opened: context, batches, threads, cache types."""

    n_ctx: int = parameter(
        0,
        "tokens that prompt and answer may have together; 0 takes the model's own length "
        "(memory is committed as it fills)",
        "int",
        low=0,
        high=1 << 26,
        flag="--ctx",
    )
    n_batch: int = parameter(
        512, "prompt tokens computed at once", "int", low=1, high=1 << 16, flag="--batch"
    )
    n_threads: int | None = parameter(
        None,
        "threads that compute (default: one a physical core)",
        "int",
        low=1,
        high=1024,
        optional=True,
        flag="--threads",
    )
    seed: int = parameter(
        RANDOM_SEED,
        "seed of the sampler (default, and -1: a new one every time)",
        "int",
        low=-1,
        high=2**64 - 1,
    )
    n_gpu_layers: int = parameter(
        0,
        "-1 computes on the GPU (which needs a build with CUDA), 0 on the CPU, N the last N "
        "layers on the GPU",
        "int",
        low=-1,
        high=1 << 31,
        flag="--gpu-layers",
    )
    main_gpu: int = parameter(0, "which GPU, where there are several", "int", low=0, high=1023)
    vram_limit: int | None = parameter(
        None,
        "GPU memory that the model may take, for example 8GiB (default: most of what is free)",
        "size",
        optional=True,
    )
    type_k: str = parameter("f16", "type of the cached keys", "str", choices=CACHE_TYPES)
    type_v: str = parameter("f16", "type of the cached values", "str", choices=CACHE_TYPES)
    memory_limit: int | None = parameter(
        None,
        "memory that the process may hold, for example 2GiB; dense FFN weights then come in a "
        "layer at a time where they do not fit (default: no limit)",
        "size",
        optional=True,
    )
    activation: str | None = parameter(
        None,
        "the activation of the feed-forward networks, for files that have lost it: relu, drelu "
        "(on gate and up), fatrelu:0.01, silu or gelu_tanh (default: what the file says)",
        "text",
        optional=True,
        metavar="NAME",
    )
    f32_activations: bool = parameter(
        False, "keep activations in float32, not 8 bits or bf16; slower, for comparisons", "bool"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed == -1:  # llama.cpp's word for it
            object.__setattr__(self, "seed", RANDOM_SEED)
        if self.vram_limit is not None and self.n_gpu_layers == 0:
            raise _wrong(
                "vram_limit", self.vram_limit, "none, since n_gpu_layers is 0: nothing is on a GPU"
            )


# llama-cpp-python names cache types by ggml's numbers.
_GGML_CACHE_TYPES = {0: "f32", 1: "f16", 8: "q8_0"}


def cache_type(value: str | int | None, default: str) -> str:
    """A cache type by name or by ggml's number; None is the default."""
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        return _GGML_CACHE_TYPES.get(value, str(value))
    return value.lower() if isinstance(value, str) else value
