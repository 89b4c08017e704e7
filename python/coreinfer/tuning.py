"""Tuning: what core settings cost in text and gain in speed, measured on a user's own text.

Flows in: a model and token ids of a text. Flows out: a table of settings by prompt length, and from
it the cheapest setting whose measured KL to dense decoding is within what a user allows. The file
is small JSON beside the model, and is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import sidecar
from .config import CoreConfig, SamplingConfig
from .warning import warn

if TYPE_CHECKING:
    from .clusters import Clusters
    from .timings import Timings
    from .token_model import TokenModel

FORMAT_NAME = "coreinfer tuning"
FORMAT_VERSION = 4
_READ_VERSIONS = (3, FORMAT_VERSION)
_MAX_FILE_BYTES = 1 << 24
_BLOCK = 256  # rows of (n, n_vocab) that are widened to float64 at once
_CONFIG_FIELDS = (
    *("mode", "beta", "statistic", "alpha", "layers", "first_layer", "weighted"),
    *("patch", "prior", "gamma", "blend", "start"),
)
# What rows of that version mean by leaving it out.
_NOT_IN_3 = {"start": 0, "choosing": 0.0, "temperature": 0.0}

PROMPT_TOKENS = (64, 128, 256)  # lengths that are measured
ANSWER_TOKENS = 48  # of the model's own continuation, forced through the core neurons
BETAS = (0.2, 0.4, 0.6, 0.8, 0.9)
STARTS = (0,)
TEMPERATURES = (SamplingConfig.temperature,)  # that answers are drawn at unless asked otherwise
EXPECTED_ANSWER = 256  # tokens that an answer is taken to have, unless it may have fewer


@dataclass(frozen=True)
class Row:
    """One setting, measured with prompts of one length.

    Attributes
    ----------
    config : CoreConfig
        The setting (mode "stable" or "similar").
    n_prompt : int
        Tokens of the prompts.
    kl : float
        Mean KL divergence of dense decoding to this setting, in nats, over answer tokens that core
        neurons decode.
    kl_error : float
        Standard error of that mean over texts.
    agreement : float
        Share of positions with the same likeliest token.
    stability : float
        The least stability among the texts that chose the neurons (0 where it is not defined).
    weight_share : float
        Weight bytes that a token decoded with core neurons reads, over dense.
    speed : float
        Tokens a second of core neurons over dense decoding's, measured in turn.
    clusters : str
        Digest of the clusters that chose the neurons, or from whose texts the patch learned; ""
        where there were none.
    cluster_similarity : float or None
        The least cosine of a prompt to its cluster; None where no cluster chose.
    choosing : float
        What choosing, gathering and patching take, and reading a dense beginning again, in tokens
        that dense decoding would decode meanwhile.
    temperature : float
        That the answers were drawn at. Greedy ones repeat themselves, which makes them easier.
    """

    config: CoreConfig
    n_prompt: int
    kl: float
    kl_error: float
    agreement: float
    stability: float
    weight_share: float
    speed: float
    clusters: str = ""
    cluster_similarity: float | None = None
    choosing: float = 0.0
    temperature: float = SamplingConfig.temperature

    def __post_init__(self) -> None:
        if self.config.mode == "similar":
            sidecar.number(vars(self), "cluster_similarity", -1, 1)
        elif self.cluster_similarity is not None:
            raise ValueError(f"cluster_similarity is {self.cluster_similarity}; expected None")

    def within(self, max_kl: float) -> bool:
        """Whether the divergence, its uncertainty included, is within `max_kl`."""
        return self.kl + self.kl_error <= max_kl


@dataclass(frozen=True)
class Choice:
    """A setting, its measured KL, and the prompts it may be used for: those like the measured ones.

    From `n_prompt` tokens on, and from this `stability` or, by clusters, `cluster_similarity` on,
    for answers drawn at up to this `temperature`. `speed` and `choosing` are a `Row`'s.
    """

    config: CoreConfig
    n_prompt: int
    stability: float
    kl: float
    speed: float
    choosing: float
    temperature: float
    cluster_similarity: float | None = None


@dataclass(frozen=True)
class Tuning:
    """The measured rows of one model file (by fingerprint)."""

    fingerprint: int
    rows: tuple[Row, ...]

    def choices(self, max_kl: float, *, mode: str = "stable", clusters: str = "") -> list[Choice]:
        """Every setting that stays within `max_kl` from some prompt length on.

        Of those of this mode measured with these clusters (a digest), or of those without any.
        A setting counts from the shortest measured length at which it, and it at every longer
        length, is within; one whose neurons are not faster than dense decoding never does.
        """
        found = []
        measured: dict[tuple[CoreConfig, float], list[Row]] = {}
        for row in self.rows:
            if (row.config.mode, row.clusters) == (mode, clusters):
                measured.setdefault((row.config, row.temperature), []).append(row)
        for (config, temperature), rows in measured.items():
            rows.sort(key=lambda row: -row.n_prompt)
            passing = []
            for row in rows:
                if not row.within(max_kl) or row.speed <= 1.0:
                    break
                passing.append(row)
            if not passing:
                continue
            similarities = [row.cluster_similarity for row in passing]
            choice = Choice(
                config,
                n_prompt=passing[-1].n_prompt,
                stability=min(row.stability for row in passing),
                kl=max(row.kl for row in passing),
                speed=float(np.mean([row.speed for row in passing])),
                choosing=float(np.mean([row.choosing for row in passing])),
                temperature=temperature,
                cluster_similarity=min(similarities) if mode == "similar" else None,  # type: ignore[type-var]
            )
            found.append(choice)
        return found

    def choose(
        self,
        max_kl: float,
        *,
        mode: str = "stable",
        clusters: str = "",
        n_answer: int = EXPECTED_ANSWER,
        temperature: float = SamplingConfig.temperature,
    ) -> Choice | None:
        """Of `choices` the `fastest` for an answer of `n_answer` tokens."""
        return fastest(self.choices(max_kl, mode=mode, clusters=clusters), n_answer, temperature)

    def known(self, config: CoreConfig, n_tokens: int) -> float | None:
        """Measured KL of a setting with prompts of `n_tokens`: of the longest that are no longer.

        At the highest temperature. None where none was measured.
        """

        def setting(config: CoreConfig) -> list[Any]:
            return [getattr(config, field) for field in _CONFIG_FIELDS]

        rows = [
            row
            for row in self.rows
            if row.n_prompt <= n_tokens
            and not row.clusters
            and setting(row.config) == setting(config)
        ]
        return max(rows, key=lambda row: (row.n_prompt, row.temperature)).kl if rows else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, to a temporary file first, then renamed over `path`.

        Raises OSError if the system refuses (disk full, no permission); the old file then stays.
        """
        rows = [
            {f: getattr(row.config, f) for f in _CONFIG_FIELDS}
            | {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "config"}
            for row in self.rows
        ]
        document = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "fingerprint": str(self.fingerprint),
            "rows": rows,
        }
        text = json.dumps(document, indent=1) + "\n"
        sidecar.write_replacing(path, "tuning file", lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tuning:
        """Read a tuning file; ValueError that says what is wrong with it."""
        with sidecar.open_regular(path, "tuning file") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        try:
            if len(data) > _MAX_FILE_BYTES:
                raise ValueError(f"it has more than {_MAX_FILE_BYTES} bytes")
            document = json.loads(data.decode("utf-8"))
            if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
                raise ValueError(f"it does not say {FORMAT_NAME!r}")
            if document.get("version") not in _READ_VERSIONS:
                known = " and ".join(map(str, _READ_VERSIONS))
                raise ValueError(
                    f"version {document.get('version')!r}; this build reads {known}: run "
                    "`coreinfer tune` again, or remove the file"
                )
            rows = document["rows"]
            if not isinstance(rows, list):
                raise ValueError("rows is not a list")
            left_out = {} if document["version"] == FORMAT_VERSION else _NOT_IN_3
            rows = tuple(_row(entry, left_out) for entry in rows)
            return cls(int(document["fingerprint"]), rows)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{os.fspath(path)}: not a valid tuning file: {reason}") from error


def gain(measured: Row | Choice, n_answer: int) -> float:
    """Seconds that dense decoding takes for an answer of `n_answer` tokens, over this setting's.

    Choosing the neurons and a dense beginning are counted; the first token is the prompt's.
    """
    n, start = n_answer - 1, measured.config.start
    if n <= start:
        return 1.0
    return n / (start + measured.choosing + (n - start) / measured.speed)


def fastest(choices: Sequence[Choice], n_answer: int | None, temperature: float) -> Choice | None:
    """The one that gains most over an answer of `n_answer` tokens, None where none gains.

    None for `n_answer` asks for the one that decodes fastest once its neurons are chosen. Only
    those count that were measured at this temperature or a higher one.
    """
    choices = [choice for choice in choices if choice.temperature >= temperature]
    if n_answer is None:
        return max(choices, key=lambda choice: choice.speed, default=None)
    gaining = [choice for choice in choices if gain(choice, n_answer) > 1.0]
    return max(gaining, key=lambda choice: gain(choice, n_answer), default=None)


def _row(entry: Any, left_out: dict[str, Any]) -> Row:
    """The row of an object, with the values of what its version leaves out."""
    if not isinstance(entry, dict):
        raise ValueError(f"a row is {entry!r}; expected an object")
    entry = {**entry, **left_out}
    config = CoreConfig.of_fields({f: entry[f] for f in _CONFIG_FIELDS})
    if config.mode not in ("stable", "similar"):
        raise ValueError(f"mode is {config.mode!r}; expected stable or similar")
    clusters = entry["clusters"]
    if not isinstance(clusters, str):
        raise ValueError(f"clusters is {clusters!r}; expected a digest")
    numbers = {}
    for f in dataclasses.fields(Row):
        if f.name in ("config", "clusters", "cluster_similarity"):
            continue
        value = entry[f.name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{f.name} is {value!r}; expected a number")
        if not math.isfinite(value) or (value < 0 and f.name != "stability"):
            raise ValueError(f"{f.name} is {value!r}; expected a number of at least 0")
        numbers[f.name] = value
    return Row(config, **numbers, clusters=clusters, cluster_similarity=entry["cluster_similarity"])


def tuning_path(model_path: str | os.PathLike[str]) -> Path:
    """Where the tuning file of a model is looked for: beside it, `.tuning.json` added."""
    return Path(os.fsdecode(model_path) + ".tuning.json")


def find_tuning(model_path: str | os.PathLike[str], fingerprint: int) -> Tuning | None:
    """The tuning file beside a model, if there is one.

    One that this user may not read is left alone with a warning: whoever shares a model may not
    share the file, and without it auto is exact, which is no worse a text.

    Raises
    ------
    ValueError
        The file is damaged, or belongs to another model file.
    """
    path = tuning_path(model_path)
    if not path.is_file():
        return None
    try:
        tuning = Tuning.load(path)
    except PermissionError as error:
        warn(f"{path}: the tuning file is not used: {error.strerror}")
        return None
    if tuning.fingerprint != fingerprint:
        raise ValueError(
            f"{path}: the tuning file belongs to another model file or activation; run "
            "`coreinfer tune` again, or remove it"
        )
    return tuning


def tuning_of(
    given: str | os.PathLike[str] | Tuning | None,
    model_path: str | os.PathLike[str],
    fingerprint: int,
) -> Tuning | None:
    """The table that was given, as a value or a file, or that lies beside the model.

    ValueError for another model's, or a damaged one.
    """
    if given is None:
        return find_tuning(model_path, fingerprint)
    tuning = given if isinstance(given, Tuning) else Tuning.load(given)
    if tuning.fingerprint != fingerprint:
        where = "" if isinstance(given, Tuning) else f"{os.fspath(given)}: "
        raise ValueError(
            f"{where}the tuning file belongs to another model file or activation; run "
            "`coreinfer tune` with this one"
        )
    return tuning


def cut(
    ids: np.ndarray, n_prompt: int, n_texts: int, *, bos: int | None = None
) -> list[np.ndarray]:
    """`n_texts` prompts of `n_prompt` ids, spread evenly over `ids`; ValueError if it is short.

    Every one begins with `bos`, if given: a prompt from the middle of a text is read as the whole
    of one.
    """
    opening = np.array([] if bos is None else [bos], ids.dtype)
    n = n_prompt - opening.size  # of the text's own
    if ids.size < n:
        raise ValueError(
            f"the text has {ids.size + opening.size} tokens; expected at least {n_prompt} for one "
            "prompt"
        )
    n_texts = min(n_texts, ids.size // n) if n else 1
    starts = np.linspace(0, ids.size - n, n_texts).astype(int)
    return [np.concatenate([opening, ids[s : s + n]]) for s in starts]


def divergence(dense: np.ndarray, got: np.ndarray) -> np.ndarray:
    """KL divergence of `dense` to `got`, both ln p of shape (n, n_vocab), in nats: float64 (n,)."""
    parts = [np.zeros(0)]
    for k in range(0, len(dense), _BLOCK):
        p = dense[k : k + _BLOCK].astype(np.float64)
        parts.append((np.exp(p) * (p - got[k : k + _BLOCK])).sum(axis=1))
    return np.concatenate(parts)


def agreement(dense: np.ndarray, got: np.ndarray) -> float:
    """Share of rows of (n, n_vocab) whose largest entry is at the same place."""
    return float((got.argmax(axis=1) == dense.argmax(axis=1)).mean())


def measure(
    llm: TokenModel,
    ids: np.ndarray,
    configs: Sequence[CoreConfig],
    *,
    n_prompts: Sequence[int] = PROMPT_TOKENS,
    n_texts: int = 8,
    n_answer: int = ANSWER_TOKENS,
    temperatures: Sequence[float] = TEMPERATURES,
    bos: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Row]:
    """One `Row` per setting, prompt length and temperature of the answers.

    `ids` are a text's, without the `bos` of a prompt.

    Lengths that are longer than the text, or with the answer than the context, are left out;
    ValueError if that is all of them.

    Every prompt is answered by dense decoding, at each temperature; the answer is then forced
    through each setting's core neurons, as `score` does, and compared with dense position by
    position: `n_answer` tokens of it, after those that the setting begins dense with.
    """
    for name, least, values in (
        ("n_prompts", 1, n_prompts),
        ("n_texts", 1, [n_texts]),
        ("n_answer", 2, [n_answer]),  # the first token's distribution is the prompt's own
    ):
        if min(values, default=0) < least:
            raise ValueError(f"{name} is {min(values, default=0)}; expected at least {least}")
    for config in configs:
        if config.mode not in ("stable", "similar"):
            raise ValueError(f"mode is {config.mode!r}; expected stable or similar")
    n_ids = ids.size + (bos is not None)
    n_whole = n_answer + max(config.start for config in configs)
    room = llm.n_ctx() - n_whole
    lengths = sorted({n for n in n_prompts if n <= min(n_ids, room)})
    if not lengths:
        cut(ids, min(n_prompts), 1, bos=bos)  # says how long the text must be
        raise ValueError(
            f"prompts of {min(n_prompts)} tokens and answers of {n_whole} do not fit the context "
            f"of {llm.n_ctx()}; expected shorter ones, or a larger n_ctx"
        )
    cuts = {n: cut(ids, n, n_texts, bos=bos) for n in lengths}
    total = sum(len(texts) for texts in cuts.values()) * len(configs) * len(temperatures)
    done = 0
    for (n_prompt, texts), temperature in product(cuts.items(), temperatures):
        sampling = SamplingConfig(temperature=temperature)
        found: list[list[tuple[float | None, ...]]] = [[] for _ in configs]
        for number, text in enumerate(texts):
            llm.core = "off"
            answer, at = _answered(llm, text, n_whole, sampling, number)
            dense = llm.score(text, answer)
            for config, figures in zip(configs, found, strict=True):
                llm.core = config
                # Of these rows the first is dense whatever decodes: it comes before the choice.
                compared = slice(config.start + 1, config.start + n_answer)
                got = llm.score(text, answer[: compared.stop])[compared]
                kl = float(divergence(dense[compared], got).mean())
                same = agreement(dense[compared], got)
                timings = llm.timings
                share = timings.decode_weight_bytes / timings.dense_weight_bytes
                stability = llm.core_set.stability or 0.0
                near = llm.core_set.cluster_similarity
                _, own_at = _answered(llm, text, compared.stop, sampling, number)
                first, last = config.start, compared.stop - 1
                seconds, own_seconds = (t[last] - t[first] for t in (at, own_at))
                choosing = _choosing_seconds(timings) * (n_answer - 1) / seconds
                speed = seconds / own_seconds
                figures.append((kl, same, stability, near, share, speed, choosing))
                done += 1
                if progress is not None:
                    progress(done, total)
        for config, figures in zip(configs, found, strict=True):
            kl, same, stability, near, share, speed, choosing = np.array(figures, np.float64).T
            error = kl.std(ddof=1) / math.sqrt(kl.size) if kl.size > 1 else kl[0]
            yield Row(
                config,
                n_prompt,
                float(kl.mean()),
                float(error),
                float(same.mean()),
                float(stability.min()),
                float(share.mean()),
                float(np.median(speed)),
                llm.clusters.digest if llm.clusters and _uses(config, llm.clusters) else "",
                float(near.min()) if config.mode == "similar" else None,
                float(np.median(choosing)),
                temperature,
            )


def _uses(config: CoreConfig, clusters: Clusters) -> bool:
    learns = bool(config.patch) and config.prior and clusters.prior is not None
    return config.mode == "similar" or learns


def _choosing_seconds(timings: Timings) -> float:
    looking_up = timings.embed_seconds + timings.lookup_seconds
    gathering = timings.select_seconds + timings.compact_seconds + timings.patch_seconds
    return timings.replay_seconds + looking_up + gathering


def _answered(
    llm: TokenModel, prompt: np.ndarray, n: int, sampling: SamplingConfig, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """n tokens after a prompt, and when each of them was there, in seconds."""
    answer: list[int] = []
    at: list[float] = []
    for token in llm.generate_ids(prompt, sampling, seed=seed):
        at.append(time.perf_counter())
        answer.append(token)
        if len(answer) == n:
            break
    return np.array(answer, np.int32), np.array(at)
