"""Auto: which core setting decodes a prompt, with one promise: no worse text than was asked for.

Flows in: what a user allows, a tuning table and clusters if there are some, and facts of the
prompt. Flows out: a `Decision`. Without a table, decoding is exact: the text of dense decoding, and
core neurons only draft.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .clusters import Clusters
from .config import CoreConfig
from .tuning import Choice, Tuning


@dataclass(frozen=True)
class Decision:
    """What decodes a text, and why.

    Attributes
    ----------
    config : CoreConfig
        The setting: mode "exact", "stable" or "similar".
    reason : str
        In words, for people.
    kl : float or None
        Mean KL to dense decoding in nats as measured, 0 for exact, None where it is not known.
    until : int or None
        Decide again once the text has this many tokens.
    stability : float or None
        The text's, that the decision went by; None where it is not defined.
    """

    config: CoreConfig
    reason: str
    kl: float | None
    until: int | None = None
    stability: float | None = None


class Auto:
    """The decisions of one model under `core="auto"`."""

    _AGAIN = 32  # tokens between looks at a text that is not stable yet

    def __init__(
        self,
        core: CoreConfig,
        tuning: Tuning | None,
        *,
        ffn_resident: bool,
        clusters: Clusters | None = None,
    ) -> None:
        self._core = core
        self._resident = ffn_resident
        self._tuning = tuning
        self._choice: Choice | None = None
        self._similar: Choice | None = None  # for prompts that the choice is not for
        if tuning is not None:
            own = tuning.choose(core.max_kl)
            if clusters is not None:
                digest = clusters.digest
                if own is not None:  # as measured: without what the clusters' texts taught
                    own = replace(own, config=replace(own.config, prior=False))
                own = tuning.choose(core.max_kl, clusters=digest) or own
                self._similar = tuning.choose(core.max_kl, mode="similar", clusters=digest)
            self._choice = own

    @property
    def counting(self) -> CoreConfig:
        """The setting whose statistic a prompt's prefill counts."""
        for choice in (self._choice, self._similar):
            if choice is not None:
                return choice.config
        return replace(self._core, mode="exact" if self._resident else "stable")

    def decide(self, n_tokens: int, stability: float | None) -> Decision:
        """For a text of `n_tokens`; `stability` is that of `counting`, None if undefined."""
        if self._resident:
            decision = self._with_dense(n_tokens, stability)
        else:
            decision = self._without_dense(n_tokens, stability)
        return replace(decision, stability=stability)

    def _unlike(
        self, choice: Choice, n_tokens: int, stability: float | None
    ) -> tuple[str, int] | None:
        """Why a text is not one that a choice was measured with, and when to look again."""
        if n_tokens < choice.n_prompt:
            within = f"measured within {self._allowed} from {choice.n_prompt} on"
            return f"{n_tokens} tokens; {within}", choice.n_prompt
        if choice.config.mode != "similar" and (stability or 0.0) < choice.stability:
            measured = f"measured from {choice.stability:.2f} on"
            return f"stability {stability or 0.0:.2f}, {measured}", n_tokens + self._AGAIN
        return None

    @property
    def _allowed(self) -> str:
        return f"KL {self._core.max_kl:g}"

    def _with_dense(self, n_tokens: int, stability: float | None) -> Decision:
        until = None
        if self._choice is None:
            nothing = f"nothing measured is within {self._allowed}"
            reason = "no tuning file" if self._tuning is None else nothing
        else:
            unlike = self._unlike(self._choice, n_tokens, stability)
            if unlike is None:
                within = f"measured within {self._allowed}"
                return Decision(self._choice.config, within, self._choice.kl)
            reason, until = unlike
        similar = self._similar
        if similar is not None and self._unlike(similar, n_tokens, stability) is None:
            reason += f"; the prompt's cluster is measured within {self._allowed}"
            return Decision(similar.config, reason, similar.kl)
        return Decision(replace(self.counting, mode="exact"), reason, 0.0, until)

    def _without_dense(self, n_tokens: int, stability: float | None) -> Decision:
        """Every dense token would bring in all weights again, so that there is no waiting."""
        kept_out = "the memory limit keeps dense FFN weights out"
        choices = [c for c in (self._choice, self._similar) if c is not None]
        for choice in choices:
            if self._unlike(choice, n_tokens, stability) is None:
                within = f"{kept_out}; measured within {self._allowed}"
                return Decision(choice.config, within, choice.kl)
        if choices:
            why, _ = self._unlike(choices[0], n_tokens, stability)  # type: ignore[misc]
            reason = f"{kept_out}, and how far such a text is from dense decoding is not known: "
            return Decision(choices[0].config, reason + why, None)
        kl = None if self._tuning is None else self._tuning.known(self.counting, n_tokens)
        if kl is not None:
            above = f"KL {kl:.2g}, more than the allowed {self._core.max_kl:g}"
            return Decision(self.counting, f"{kept_out}; measured {above}", kl)
        reason = (
            f"{kept_out}, and how far the text is from dense decoding is not known: "
            "`coreinfer tune` without the limit measures it"
        )
        return Decision(self.counting, reason, None)
