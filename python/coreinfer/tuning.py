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
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import sidecar
from .config import CoreConfig, SamplingConfig

if TYPE_CHECKING:
    from .clusters import Clusters
    from .token_model import TokenModel

FORMAT_NAME = "coreinfer tuning"
FORMAT_VERSION = 3
_MAX_FILE_BYTES = 1 << 24
_BLOCK = 256  # rows of (n, n_vocab) that are widened to float64 at once
_CONFIG_FIELDS = (
    *("mode", "beta", "statistic", "alpha", "layers", "first_layer", "weighted"),
    *("patch", "prior", "gamma", "blend"),
)

PROMPT_TOKENS = (64, 128, 256)  # lengths that are measured
ANSWER_TOKENS = 48  # of the model's own continuation, forced through the core neurons
BETAS = (0.2, 0.4, 0.6, 0.8, 0.9)


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
        Mean KL divergence of dense decoding to this setting, in nats, over answer tokens.
    kl_error : float
        Standard error of that mean over texts.
    agreement : float
        Share of positions with the same likeliest token.
    stability : float
        The least stability among the prompts (0 where it is not defined).
    weight_share : float
        Weight bytes that a decoded token reads, over dense.
    speed : float
        Tokens a second over dense decoding's, measured in turn.
    clusters : str
        Digest of the clusters that chose the neurons, or from whose texts the patch learned; ""
        where there were none.
    cluster_similarity : float or None
        The least cosine of a prompt to its cluster; None where no cluster chose.
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

    From `n_prompt` tokens on, and from this `stability` or, by clusters, `cluster_similarity` on.
    """

    config: CoreConfig
    n_prompt: int
    stability: float
    kl: float
    cluster_similarity: float | None = None


@dataclass(frozen=True)
class Tuning:
    """The measured rows of one model file (by fingerprint)."""

    fingerprint: int
    rows: tuple[Row, ...]

    def choose(self, max_kl: float, *, mode: str = "stable", clusters: str = "") -> Choice | None:
        """The fastest setting that stays within `max_kl` from some prompt length on, or None.

        Of those of this mode measured with these clusters (a digest), or of those without any.
        A setting counts from the shortest measured length at which it, and it at every longer
        length, is within; a setting that is not faster than dense decoding never does.
        """
        best: tuple[float, Choice] | None = None
        measured = [r for r in self.rows if (r.config.mode, r.clusters) == (mode, clusters)]
        for config in dict.fromkeys(row.config for row in measured):
            rows = sorted((r for r in measured if r.config == config), key=lambda r: -r.n_prompt)
            passing = []
            for row in rows:
                if not row.within(max_kl) or row.speed <= 1.0:
                    break
                passing.append(row)
            if not passing:
                continue
            speed = float(np.mean([row.speed for row in passing]))
            similarities = [row.cluster_similarity for row in passing]
            choice = Choice(
                config,
                passing[-1].n_prompt,
                min(row.stability for row in passing),
                max(row.kl for row in passing),
                min(similarities) if config.mode == "similar" else None,  # type: ignore[type-var]
            )
            if best is None or speed > best[0]:
                best = speed, choice
        return None if best is None else best[1]

    def known(self, config: CoreConfig, n_tokens: int) -> float | None:
        """Measured KL of a setting with prompts of `n_tokens`: of the longest that are no longer.

        None where none was measured.
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
        return max(rows, key=lambda row: row.n_prompt).kl if rows else None

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
        with open(os.fspath(path), "rb") as file:  # not a number, which is an open file's
            data = file.read(_MAX_FILE_BYTES + 1)
        try:
            if len(data) > _MAX_FILE_BYTES:
                raise ValueError(f"it has more than {_MAX_FILE_BYTES} bytes")
            document = json.loads(data.decode("utf-8"))
            if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
                raise ValueError(f"it does not say {FORMAT_NAME!r}")
            if document.get("version") != FORMAT_VERSION:
                raise ValueError(
                    f"version {document.get('version')!r}; this build reads {FORMAT_VERSION}: run "
                    "`coreinfer tune` again, or remove the file"
                )
            rows = document["rows"]
            if not isinstance(rows, list):
                raise ValueError("rows is not a list")
            return cls(int(document["fingerprint"]), tuple(map(_row, rows)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{os.fspath(path)}: not a valid tuning file: {reason}") from error


def _row(entry: Any) -> Row:
    if not isinstance(entry, dict):
        raise ValueError(f"a row is {entry!r}; expected an object")
    config = CoreConfig(**{f: entry[f] for f in _CONFIG_FIELDS})
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
        warnings.warn(f"{path}: the tuning file is not used: {error.strerror}", stacklevel=2)
        return None
    if tuning.fingerprint != fingerprint:
        raise ValueError(
            f"{path}: the tuning file belongs to another model file; run `coreinfer tune` again, "
            "or remove it"
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
            f"{where}the tuning file belongs to another model file; run `coreinfer tune` with this "
            "one"
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
    bos: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Row]:
    """One `Row` per setting and prompt length; `ids` are a text's, without the `bos` of a prompt.

    Lengths that are longer than the text, or with the answer than the context, are left out;
    ValueError if that is all of them.

    Every prompt is answered greedily by dense decoding; the answer is then forced through each
    setting's core neurons, as `score` does, and compared with dense position by position.
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
    room = llm.n_ctx() - n_answer
    lengths = sorted({n for n in n_prompts if n <= min(n_ids, room)})
    if not lengths:
        cut(ids, min(n_prompts), 1, bos=bos)  # says how long the text must be
        raise ValueError(
            f"prompts of {min(n_prompts)} tokens and answers of {n_answer} do not fit the context "
            f"of {llm.n_ctx()}; expected shorter ones, or a larger n_ctx"
        )
    cuts = {n: cut(ids, n, n_texts, bos=bos) for n in lengths}
    total = sum(len(texts) for texts in cuts.values()) * len(configs)
    done = 0
    for n_prompt, texts in cuts.items():
        found: list[list[tuple[float | None, ...]]] = [[] for _ in configs]
        for text in texts:
            llm.core = "off"
            answer, seconds = _answered(llm, text, n_answer)
            dense = llm.score(text, answer)[1:]
            for config, figures in zip(configs, found, strict=True):
                llm.core = config
                got = llm.score(text, answer)[1:]
                kl = float(divergence(dense, got).mean())
                same = agreement(dense, got)
                timings = llm.timings
                share = timings.decode_weight_bytes / timings.dense_weight_bytes
                stability = llm.core_set.stability or 0.0
                near = llm.core_set.cluster_similarity
                _, own_seconds = _answered(llm, text, n_answer)
                figures.append((kl, same, stability, near, share, seconds / own_seconds))
                done += 1
                if progress is not None:
                    progress(done, total)
        for config, figures in zip(configs, found, strict=True):
            kl, same, stability, near, share, speed = np.array(figures, np.float64).T
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
            )


def _uses(config: CoreConfig, clusters: Clusters) -> bool:
    learns = bool(config.patch) and config.prior and clusters.prior is not None
    return config.mode == "similar" or learns


def _answered(llm: TokenModel, prompt: np.ndarray, n: int) -> tuple[np.ndarray, float]:
    """n greedy tokens after a prompt, and the seconds that decoding them took."""
    answer: list[int] = []
    start = 0.0
    for token in llm.generate_ids(prompt, SamplingConfig(temperature=0.0)):
        if not answer:
            start = time.perf_counter()
        answer.append(token)
        if len(answer) == n:
            break
    return np.array(answer, np.int32), time.perf_counter() - start
