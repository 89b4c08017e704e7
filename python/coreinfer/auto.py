"""Auto: which core setting decodes a prompt, with one promise: no worse text than was asked for.

Flows in: what a user allows, a tuning table and clusters if there are some, and facts of the
prompt. Flows out: a `Decision`. Without a table, decoding is exact: the text of dense decoding, and
core neurons only draft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .clusters import Clusters
from .config import CoreConfig, SamplingConfig
from .tuning import EXPECTED_ANSWER, Choice, Tuning, fastest


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


# Why a text is not one that a choice was measured with, and when to look again.
_Unlike = Callable[[Choice], "tuple[str, int | None] | None"]


class Auto:
    """The decisions of one model under `core="auto"`.

    Among several settings within what is allowed, for answers drawn at such a temperature, the
    fastest is taken, over an answer of `EXPECTED_ANSWER` tokens, or of the most that it may have
    where that is fewer. Where the dense weights do not stay, none that begins dense is, the
    answer's length does not matter, and one drawn at a higher temperature than any measured is
    decoded as those of the highest are.
    """

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
        own: list[Choice] = []
        learned: list[Choice] = []  # of these, with a patch that learned from the clusters' texts
        by_clusters: list[Choice] = []
        if tuning is not None:
            own = tuning.choices(core.max_kl)
            if clusters is not None:
                digest = clusters.digest
                # As measured: without what the clusters' texts taught.
                own = [replace(c, config=replace(c.config, prior=False)) for c in own]
                learned = tuning.choices(core.max_kl, clusters=digest)
                by_clusters = tuning.choices(core.max_kl, mode="similar", clusters=digest)
        self._possible = [
            [choice for choice in choices if ffn_resident or not choice.config.start]
            for choices in (learned, own, by_clusters)
        ]
        self._choice: Choice | None = None
        self._similar: Choice | None = None  # for prompts that the choice is not for
        self.begin()

    def begin(
        self, n_answer: int | None = None, temperature: float = SamplingConfig.temperature
    ) -> None:
        """A text begins whose answer is drawn so, and has at most `n_answer` tokens, if known."""
        expected = min(n_answer or EXPECTED_ANSWER, EXPECTED_ANSWER) if self._resident else None
        self._temperature = temperature
        self._choice, self._similar = self._fastest(expected, temperature)
        self._answer = f"an answer of {expected} tokens at temperature {temperature:g}"

    def _fastest(
        self, n_answer: int | None, temperature: float
    ) -> tuple[Choice | None, Choice | None]:
        """Of the prompt's own neurons, and of its cluster's."""
        if not self._resident:
            temperature = min(temperature, max(self._temperatures(), default=temperature))
        learned, own, similar = (
            fastest(choices, n_answer, temperature) for choices in self._possible
        )
        return learned or own, similar

    def _temperatures(self) -> set[float]:
        return {choice.temperature for choices in self._possible for choice in choices}

    @property
    def counting(self) -> CoreConfig:
        """The setting whose statistic a prompt's prefill counts."""
        for choice in (self._choice, self._similar):
            if choice is not None:
                return choice.config
        return self._core.in_mode("exact" if self._resident else "stable")

    @property
    def _exact(self) -> CoreConfig:
        """Drafts take no larger share than a measured setting: memory is planned by those."""
        exact = replace(self.counting.in_mode("exact"), max_drafts=self._core.max_drafts)
        shares = [choice.config.share for choices in self._possible for choice in choices]
        return replace(exact, beta=min(exact.beta, max(shares, default=1.0)))

    @property
    def settings(self) -> list[CoreConfig]:
        """What some text may be decoded with; exact mode is among it if the dense weights stay."""
        if self._resident:
            tuned = [choice.config for choices in self._possible for choice in choices]
            return [*tuned, self._exact]
        at = [self._fastest(None, temperature) for temperature in self._temperatures()]
        tuned = [choice.config for pair in at for choice in pair if choice is not None]
        return tuned or [self.counting]

    @property
    def by_clusters(self) -> CoreConfig | None:
        """The setting that may decode this text with a cluster's neurons, if there is one."""
        return None if self._similar is None else self._similar.config

    def decide(
        self,
        n_tokens: int,
        n_answered: int,
        stability: float | None,
        similarity: Callable[[], float],
    ) -> Decision:
        """For a text of `n_tokens`, the last `n_answered` of which are the answer's.

        `stability` is that of `counting`, None if undefined; `similarity` looks up how near the
        text's cluster is, and is called only where that matters.
        """

        def unlike(choice: Choice) -> tuple[str, int | None] | None:
            return self._unlike(choice, n_tokens, n_answered, stability, similarity)

        if self._resident:
            decision = self._with_dense(unlike)
        else:
            decision = self._without_dense(unlike, n_tokens)
        return replace(decision, stability=stability)

    def _unlike(
        self,
        choice: Choice,
        n_tokens: int,
        n_answered: int,
        stability: float | None,
        similarity: Callable[[], float],
    ) -> tuple[str, int | None] | None:
        """Why a text is not one that a choice was measured with, and when to look again."""
        if n_tokens < choice.n_prompt:
            within = f"measured within {self._allowed} from {choice.n_prompt} on"
            return f"{n_tokens} tokens; {within}", choice.n_prompt
        if choice.temperature < self._temperature:
            measured = f"measured up to {choice.temperature:g}"
            return f"temperature {self._temperature:g}, {measured}", None
        if choice.cluster_similarity is not None:
            near = similarity()
            if near < choice.cluster_similarity:  # and stays so: it is the prompt's
                measured = f"measured from {choice.cluster_similarity:.2f} on"
                return f"cluster similarity {near:.2f}, {measured}", None
        elif n_answered < choice.config.start:
            return None  # dense until then, and looked at again before neurons are chosen
        elif (stability or 0.0) < choice.stability:
            measured = f"measured from {choice.stability:.2f} on"
            return f"stability {stability or 0.0:.2f}, {measured}", n_tokens + self._AGAIN
        return None

    @property
    def _allowed(self) -> str:
        return f"KL {self._core.max_kl:g}"

    def _choices(self) -> list[Choice]:
        """What may decode with core neurons, the prompt's own before its cluster's."""
        return [choice for choice in (self._choice, self._similar) if choice is not None]

    def _with_dense(self, unlike: _Unlike) -> Decision:
        reasons, again = [], []
        for choice in self._choices():
            found = unlike(choice)
            if found is None:
                whose = "the prompt's cluster is " if choice is self._similar else ""
                start = choice.config.start
                after = f" after {start} dense tokens" if start else ""
                reasons.append(f"{whose}measured within {self._allowed}{after}")
                return Decision(choice.config, "; ".join(reasons), choice.kl)
            why, until = found
            reasons.append(why)
            again += [] if until is None else [until]
        if self._tuning is None:
            reasons = ["no tuning file"]
        elif not reasons:
            gains = f" and faster for {self._answer}" if any(self._possible) else ""
            reasons = [f"nothing measured is within {self._allowed}{gains}"]
        return Decision(self._exact, "; ".join(reasons), 0.0, min(again, default=None))

    def _without_dense(self, unlike: _Unlike, n_tokens: int) -> Decision:
        """Every dense token would bring in all weights again, so that there is no waiting."""
        kept_out = "dense FFN weights do not stay in memory"
        reasons = []
        for choice in self._choices():
            found = unlike(choice)
            if found is None:
                within = f"{kept_out}; measured within {self._allowed}"
                return Decision(choice.config, within, choice.kl)
            reasons.append(found[0])
        if reasons:
            unknown = f"{kept_out}, and how far such a text is from dense decoding is not known: "
            return Decision(self.counting, unknown + reasons[0], None)
        kl = None if self._tuning is None else self._tuning.known(self.counting, n_tokens)
        if kl is not None:
            above = f"KL {kl:.2g}, more than the allowed {self._core.max_kl:g}"
            return Decision(self.counting, f"{kept_out}; measured {above}", kl)
        reason = (
            f"{kept_out}, and how far the text is from dense decoding is not known: "
            "`coreinfer tune` measures it where they do"
        )
        return Decision(self.counting, reason, None)
