"""Auto: which core setting decodes a prompt, with one promise: no worse text than was asked for.

Flows in: what a user allows, a tuning table if there is one, and facts of the prompt. Flows out: a
`Decision`. Without a table, decoding is exact: the text of dense decoding, core neurons only draft.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import CoreConfig
from .tuning import Choice, Tuning


@dataclass(frozen=True)
class Decision:
    """What decodes a text, and why.

    Attributes
    ----------
    config : CoreConfig
        The setting: mode "exact" or "stable".
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

    def __init__(self, core: CoreConfig, tuning: Tuning | None, *, ffn_resident: bool) -> None:
        self._core = core
        self._resident = ffn_resident
        self._tuned = tuning is not None
        self._choice: Choice | None = None if tuning is None else tuning.choose(core.max_kl)

    @property
    def counting(self) -> CoreConfig:
        """The setting whose statistic a prompt's prefill counts."""
        if self._choice is not None:
            return self._choice.config
        return replace(self._core, mode="exact" if self._resident else "stable")

    def decide(self, n_tokens: int, stability: float | None) -> Decision:
        """For a text of `n_tokens`; `stability` is that of `counting`, None if undefined."""
        allowed = f"KL {self._core.max_kl:g}"
        choice = self._choice
        if not self._resident:
            # Dense weights come in a layer at a time: every dense token would read them all again.
            if choice is None:
                reason = (
                    "the memory limit keeps dense FFN weights out, and how far the text is from "
                    "dense decoding is not known: `coreinfer tune` without the limit measures it"
                )
                return Decision(self.counting, reason, None)
            reason = f"the memory limit keeps dense FFN weights out; measured within {allowed}"
            return Decision(choice.config, reason, choice.kl)
        if choice is None:
            reason = f"nothing measured is within {allowed}" if self._tuned else "no tuning file"
            return Decision(self.counting, reason, 0.0)
        exact = replace(choice.config, mode="exact")
        if n_tokens < choice.n_prompt:
            reason = f"{n_tokens} tokens; measured within {allowed} from {choice.n_prompt} on"
            return Decision(exact, reason, 0.0, choice.n_prompt)
        if (0.0 if stability is None else stability) < choice.stability:
            reason = f"stability {stability or 0.0:.2f}, measured from {choice.stability:.2f} on"
            return Decision(exact, reason, 0.0, n_tokens + self._AGAIN)
        return Decision(choice.config, f"measured within {allowed}", choice.kl)
