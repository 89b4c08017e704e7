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
    """

    config: CoreConfig
    reason: str
    kl: float | None
    until: int | None = None


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
        self._tuned = tuning is not None
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
        allowed = f"KL {self._core.max_kl:g}"
        choice, similar = self._choice, self._similar
        if not self._resident:
            # Dense weights come in a layer at a time: every dense token would read them all again.
            kept_out = "the memory limit keeps dense FFN weights out"
            if choice is None and similar is None:
                reason = (
                    f"{kept_out}, and how far the text is from dense decoding is not known: "
                    "`coreinfer tune` without the limit measures it"
                )
                return Decision(self.counting, reason, None)
            known = choice or similar
            return Decision(known.config, f"{kept_out}; measured within {allowed}", known.kl)
        until = None
        if choice is None:
            reason = f"nothing measured is within {allowed}" if self._tuned else "no tuning file"
        elif n_tokens < choice.n_prompt:
            reason = f"{n_tokens} tokens; measured within {allowed} from {choice.n_prompt} on"
            until = choice.n_prompt
        elif (0.0 if stability is None else stability) < choice.stability:
            reason = f"stability {stability or 0.0:.2f}, measured from {choice.stability:.2f} on"
            until = n_tokens + self._AGAIN
        else:
            return Decision(choice.config, f"measured within {allowed}", choice.kl)
        if similar is not None and n_tokens >= similar.n_prompt:
            reason += f"; the prompt's cluster is measured within {allowed}"
            return Decision(similar.config, reason, similar.kl)
        return Decision(replace(self.counting, mode="exact"), reason, 0.0, until)
