"""CoreChoice: which neurons decode the texts of one model, as `core` says.

Flows in: the setting, clusters, a tuning table; then, text by text, the session that has read it.
Flows out: the session's core set and patch, and what was decided. The arithmetic is the session's,
the lookup `ClusterLookup`'s, and what "auto" takes `Auto`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import _core
from .auto import Auto, Decision
from .cluster_lookup import ClusterLookup
from .clusters import Clusters
from .config import CoreConfig
from .core_sets import CoreSet
from .embedders import AnyEmbedder
from .tuning import Tuning
from .warning import warn

AnyClusters = str | os.PathLike[str] | Clusters


@dataclass(frozen=True)
class ModelFacts:
    """What of a loaded model matters for choosing; `ffn_resident`: its dense FFN weights stay."""

    n_layer: int
    n_ff: int
    n_embd: int
    fingerprint: int
    ffn_resident: bool

    @classmethod
    def of(cls, engine: _core.Engine) -> ModelFacts:
        """Those of an engine, which they do not keep alive."""
        config = engine.config
        return cls(
            n_layer=engine.n_layer,
            n_ff=config["n_ff"],
            n_embd=config["n_embd"],
            fingerprint=engine.fingerprint,
            ffn_resident=engine.ffn_resident,
        )


class CoreChoice:
    """The choice of neurons for one session's texts.

    Parameters
    ----------
    model
        Facts of the model.
    find_tuning
        Gives the model's tuning table, or None; asked whenever `core` becomes "auto".
    text_of
        What ids say: a prompt's cluster is chosen by it where no text is given.

    Attributes
    ----------
    decision : Decision or None
        What "auto" decided for the present text.
    stability : float or None
        The present text's.
    core_set : CoreSet or None
        What decodes the present text; None if it is decoded dense.
    n_dense : int
        Tokens that the present answer begins with, dense, before neurons are chosen; 0 once they
        are.
    lookup_seconds : dict of str to float
        What looking the present text's cluster up took, by the names of `Timings`.
    """

    def __init__(
        self,
        model: ModelFacts,
        find_tuning: Callable[[], Tuning | None],
        text_of: Callable[[Sequence[int]], str] | None,
    ) -> None:
        self._model = model
        self._find_tuning = find_tuning
        self._text_of = text_of
        self._config = CoreConfig.of("off")
        self._given: CoreSet | None = None  # instead of what the config would choose
        self._auto: Auto | None = None
        self._active = self._config  # for the present text: what auto decided, else the config
        self._lookup: ClusterLookup | None = None
        self._prior: _core.PatchPrior | None = None
        self._text: str | None = None  # what the present prompt says, if it was said
        self._n_prompt: int | None = None  # of the present text; None before neurons are chosen
        self._nearest: tuple[int, float] | None = None  # its cluster, once that was looked up
        self.decision: Decision | None = None
        self.stability: float | None = None
        self.core_set: CoreSet | None = None
        self.n_dense = 0
        self.lookup_seconds: dict[str, float] = {}

    # --- settings ---

    @property
    def core(self) -> CoreConfig | CoreSet:
        """The setting."""
        return self._config if self._given is None else self._given

    def set_core(self, core: str | CoreConfig | CoreSet) -> None:
        """Choose so from the next text on; after a ValueError as before."""
        given, auto = None, None
        if isinstance(core, CoreSet):
            core.check_fits(
                n_layer=self._model.n_layer,
                n_ff=self._model.n_ff,
                fingerprint=self._model.fingerprint,
            )
            given, config = core, CoreConfig.of("off")
        else:
            config = CoreConfig.of(core)
            config.check_fits(n_layer=self._model.n_layer, n_ff=self._model.n_ff)
            if config.start and not self._model.ffn_resident:
                raise ValueError(
                    f"start is {config.start}, but the memory limit does not hold the dense "
                    "weights, which an answer would begin with; expected 0, or a higher limit"
                )
            if config.mode == "similar":
                _needed(self._lookup).prepare()
            elif config.mode == "auto":
                auto = self._make_auto(config, self._lookup)
        self._given, self._config, self._auto = given, config, auto
        self._active = config
        self.decision = None

    @property
    def clusters(self) -> Clusters | None:
        """The clusters, if there are any."""
        return None if self._lookup is None else self._lookup.clusters

    @property
    def embedder(self) -> AnyEmbedder | None:
        """What was given instead of the embedder that the clusters name."""
        return None if self._lookup is None else self._lookup.embedder

    def set_clusters(
        self, clusters: AnyClusters | None, embedder: AnyEmbedder | None = None
    ) -> None:
        """Take clusters, or the file of some; None forgets them; after an error as before."""
        lookup, prior = None, None
        if clusters is not None:
            if not isinstance(clusters, Clusters):
                clusters = Clusters.load(clusters)
            clusters.check_fits(
                n_layer=self._model.n_layer,
                n_ff=self._model.n_ff,
                n_embd=self._model.n_embd,
                fingerprint=self._model.fingerprint,
            )
            if embedder is not None and clusters.by == "neurons":
                raise ValueError(
                    f"embedder is {embedder!r}, but these clusters are by neurons, which look no "
                    "text up; expected none, or clusters built with --by embedding"
                )
            lookup = ClusterLookup(clusters, embedder)
            if clusters.prior is not None:
                rows = clusters.prior
                prior = _core.PatchPrior(rows.h, rows.y, rows.weights)
        elif embedder is not None:
            raise ValueError(f"embedder is {embedder!r}, but there are no clusters to use it with")
        if self._config.mode == "similar":
            _needed(lookup).prepare()
        if self._auto is not None:
            self._auto = self._make_auto(self._config, lookup)
        self._lookup, self._prior = lookup, prior
        self._nearest = None

    def _make_auto(self, config: CoreConfig, lookup: ClusterLookup | None) -> Auto:
        auto = Auto(
            config,
            self._find_tuning(),
            ffn_resident=self._model.ffn_resident,
            clusters=None if lookup is None else lookup.clusters,
        )
        for setting in auto.settings:
            setting.check_fits(n_layer=self._model.n_layer, n_ff=self._model.n_ff)
            if setting.mode == "similar":
                _needed(lookup).prepare()
        return auto

    # --- a text ---

    @property
    def prompt(self) -> tuple[int | None, str | None]:
        """Tokens of the present prompt, and what it says: what `restore` takes them from."""
        return self._n_prompt, self._text

    def begin(self, *, goes_on: bool = False, **answer: Any) -> None:
        """Another text is about to be read, or the present one, whose answer `goes_on`.

        `answer` is what `Auto.begin` takes.
        """
        self.lookup_seconds = {}
        self.n_dense = 0
        if not goes_on:
            self._n_prompt = self._text = self._nearest = None
        self._active = self._config
        if self._auto is not None:
            self._auto.begin(**answer)
            self._active = self._auto.counting

    def counted(self) -> dict[str, Any]:
        """What a prompt's prefill counts, as the session's keyword arguments; {} for nothing."""
        return self._counted(self._active)

    def _counted(self, core: CoreConfig) -> dict[str, Any]:
        if core.mode in ("stable", "exact"):
            counted = {"statistic": core.statistic, "alpha": core.alpha, "weighted": core.weighted}
            if core.mode == "stable" and core.patch:
                counted["samples"] = _core.PATCH_SAMPLES
            return counted
        if core.mode == "similar":
            lookup = _needed(self._lookup)
            # Where auto may be exact yet, drafts are chosen by it.
            looked_at = core.blend > 0 or self._config.refresh or self._auto is not None
            if looked_at or core.patch or lookup.clusters.by == "neurons":
                of = lookup.clusters
                counted = {"statistic": of.statistic, "alpha": of.alpha, "weighted": of.weighted}
                return {**counted, "samples": _core.PATCH_SAMPLES if core.patch else 0}
        return {}

    def expected(self) -> dict[str, Any]:
        """The share that `choose` will select, as a prefill's keyword arguments, if it is known."""
        known = self._active.mode == "stable" and not self._active.start
        return self._share(self._active) if known else {}

    def choose(self, session: _core.Session, text: str | None = None) -> None:
        """Select from the prompt's statistics or by its cluster, compact, and fit the patch.

        Exact mode does so by itself, when drafting is expected to pay. `text` is what the prompt
        says, if that is known.
        """
        if self._n_prompt is None:
            self._text, self._n_prompt = text, session.n_past
        before = session.timings["replay_tokens"]
        self._choose(session)
        if self.decision is not None and session.timings["replay_tokens"] > before:
            again = f"{self.decision.reason}; the prompt was read twice, to rank neurons as the "
            self.decision = replace(self.decision, reason=again + "clusters do")

    def _choose(self, session: _core.Session) -> None:
        self.n_dense = 0
        if self._auto is not None:
            self._decide(session, self._auto)
        core = self._active
        if core.mode == "exact":
            self.stability = self._stability_of(session)
            session.set_exact(**self._share(core), max_drafts=core.max_drafts)
            self.core_set = None
            return
        session.end_exact()
        self.stability = None
        if core.mode not in ("stable", "similar"):
            self._decode_with(session, self._given)
            return
        session.replay(**self.counted())  # no work after a prefill
        self.stability = self._stability_of(session)
        if session.n_past - self._n_prompt < core.start:
            self.n_dense = core.start
            self._decode_with(session, None)
            return
        if core.mode == "stable":
            self._decode_with(session, self._stable_core(session, core))
        else:
            self._decode_with(session, self._similar_core(session, core))
        if core.patch:
            chosen, self.core_set = self.core_set, None
            session.fit_patch(self._prior if core.prior else None, rank=core.patch)
            self.core_set = replace(chosen, patch=session.core_set.patch)

    def forget(self) -> None:
        """There is no text any more."""
        self.begin()
        self.decision = self.stability = self.core_set = None

    def restore(
        self,
        session: _core.Session,
        chosen: CoreSet | None,
        prompt: tuple[int | None, str | None] = (None, None),
    ) -> None:
        """The text in the cache is decoded with these neurons, or dense: nothing is to decide.

        With a `prompt` its answer may go on.
        """
        self.forget()
        self._n_prompt, self._text = prompt
        self.stability = None if chosen is None else chosen.stability
        session.end_exact()
        self._decode_with(session, chosen)

    def _decode_with(self, session: _core.Session, chosen: CoreSet | None) -> None:
        self.core_set = None
        session.set_core(None if chosen is None else _to_core(chosen))  # no work if unchanged
        self.core_set = chosen

    def grown(self, session: _core.Session) -> None:
        """The text has another token: choose again where it is time to."""
        decision = self.decision
        if decision is not None and decision.until is not None:
            # The text was too short or not stable.
            if session.n_past >= decision.until:
                self._choose(session)
        if self.n_dense and session.n_past - self._n_prompt >= self.n_dense:
            self._choose(session)
        if self._config.refresh is not None and self._active.mode in ("stable", "similar"):
            if session.n_past - session.n_dense >= self._config.refresh:
                session.replay(**self.counted())
                self._choose(session)

    def _decide(self, session: _core.Session, auto: Auto) -> None:
        """Settle what decodes the text, given how long and how stable it is."""
        stability = None
        if auto.counting.mode != "similar":
            self._active = auto.counting
            stability = self._stability_of(session)
        before = self.decision
        self.decision = auto.decide(
            session.n_past,
            session.n_past - self._n_prompt,
            stability,
            lambda: self._look_up(session, auto.by_clusters)[1],
        )
        self._active = self.decision.config
        if self._exceeds(self.decision) and (before is None or not self._exceeds(before)):
            warn(self.decision.reason)

    def _exceeds(self, decision: Decision) -> bool:
        """Whether a text may be further from dense decoding than was asked for."""
        return decision.kl is None or decision.kl > self._config.max_kl

    def _stability_of(self, session: _core.Session) -> float | None:
        """Of the text in the cache, where its neurons were counted."""
        if not self.counted():
            return None
        layers = self._active.layer_range(self._model.n_layer)
        return session.stability(beta=self._active.share, layers=layers)

    def _share(self, core: CoreConfig) -> dict[str, Any]:
        """How many neurons are chosen by the prompt, as the session's keyword arguments."""
        layers = core.layer_range(self._model.n_layer)
        return {"beta": core.beta, "layers": layers, "first_layer": core.first_layer}

    def _stable_core(self, session: _core.Session, core: CoreConfig) -> CoreSet:
        raw = session.select(**self._share(core))
        return CoreSet(
            layers=raw.layers,
            n_ff=raw.n_ff,
            scores=raw.scores,
            statistic=core.statistic,
            alpha=core.alpha,
            beta=core.beta,
            n_tokens=raw.n_tokens,
            stability=self.stability,
            fingerprint=self._model.fingerprint,
            weighted=core.weighted,
        )

    def _similar_core(self, session: _core.Session, core: CoreConfig) -> CoreSet:
        """The neurons of the prompt's nearest cluster.

        With `refresh` they follow the text: its own scores weigh as much as what was generated is
        of all its tokens, and never less than `blend`.
        """
        lookup, nearest = _needed(self._lookup), self._look_up(session, core)
        if self._config.refresh is not None:
            core = replace(core, blend=max(core.blend, 1 - self._n_prompt / session.n_past))
        own, n_tokens = self._own(session, core) if core.blend > 0 else ((), 0)
        chosen = lookup.choose(core, nearest, own, n_tokens)
        self._note_seconds(lookup)
        return replace(chosen, stability=self.stability, fingerprint=self._model.fingerprint)

    def _look_up(self, session: _core.Session, core: CoreConfig) -> tuple[int, float]:
        """The cluster of the present prompt and its cosine; as a text grows it stays the same."""
        if self._nearest is None:
            lookup, text, own = _needed(self._lookup), "", ()
            if lookup.clusters.by == "neurons":
                # With the samples that there are: only another statistic reads the text again.
                samples = self.counted().get("samples", 0)
                session.replay(**{**self._counted(core), "samples": samples})
                own, _ = self._own(session, core)
            elif self._text is not None:
                text = self._text
            elif self._text_of is not None:
                text = self._text_of(session.tokens[: self._n_prompt])
            self._nearest = lookup.nearest(text, own)
            self._note_seconds(lookup)
        return self._nearest

    def _own(self, session: _core.Session, core: CoreConfig) -> tuple[Sequence[np.ndarray], int]:
        """The text's own scores per layer, and the tokens behind them."""
        layers = core.layer_range(self._model.n_layer)
        raw = session.select(beta=core.gamma, layers=layers)
        return raw.scores, raw.n_tokens

    def _note_seconds(self, lookup: ClusterLookup) -> None:
        self.lookup_seconds = {
            "embed_seconds": lookup.embed_seconds,
            "lookup_seconds": lookup.lookup_seconds,
        }


def _needed(lookup: ClusterLookup | None) -> ClusterLookup:
    if lookup is None:
        raise ValueError(
            "core is 'similar', which chooses by clusters, and there are none; give clusters a "
            "file that `coreinfer cluster build` made with this model"
        )
    return lookup


def _to_core(core_set: CoreSet) -> Any:
    return _core.CoreSet(
        list(core_set.layers),
        n_ff=core_set.n_ff,
        statistic=core_set.statistic,
        alpha=core_set.alpha,
        beta=core_set.beta,
        n_tokens=core_set.n_tokens,
        weighted=core_set.weighted,
        patch=list(core_set.patch) or None,
    )
