"""Token ids to text as it may be shown: whole characters, nothing of a stop string.

`StopWatcher` holds back whatever could still become a stop string; `TextStream` joins it with the
tokenizer's decoder, end tokens, a token limit and log-probabilities. It knows no response format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .types import FinishReason

TopLogprobs = list[tuple[int, float]]


class Decoder(Protocol):
    """What `Tokenizer.stream_decoder()` returns."""

    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class StopWatcher:
    """Passes text through up to the first stop string, however the text is cut into pieces.

    Of several stop strings the one that is complete first counts; of two that are complete at the
    same character, the longer. Text that is the beginning of a stop string is held back until it
    is clear that it is not one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise ValueError(f"stop is {list(stops)!r}; expected strings that are not empty")
        self._stops = list(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string was found)."""
        seen = len(self._held)
        self._held += text
        hit = self._first_complete(seen)
        if hit is not None:
            shown, self._held = self._held[:hit], ""
            return shown, True
        cut = self._safe_length()
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """The text held back, once no more can follow."""
        held, self._held = self._held, ""
        return held

    def _first_complete(self, seen: int) -> int | None:
        """Start of the stop string that ends first (ends lie beyond `seen`), or None."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = self._held.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0:
                found = (start + len(stop), start)
                best = found if best is None else min(best, found)
        return None if best is None else best[1]

    def _safe_length(self) -> int:
        """Characters that no stop string can begin in, given what follows is unknown."""
        text = self._held
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)


@dataclass(frozen=True)
class TokenInfo:
    """A generated token, where its text begins (characters), and its log-probabilities."""

    token: int
    offset: int
    logprob: float
    top: TopLogprobs


@dataclass
class TextStream:
    """Iterates over (text, tokens' log-probabilities) of one generation.

    Attributes
    ----------
    ids : list of int
        Tokens generated so far, without the end token.
    finish_reason
        "stop" after an end token, a stop string or a stopping criterion, "length" when
        `max_tokens` or the context is used up, None while running.
    """

    source: Generator[int, None, bool | None]  # returns True where a criterion ended it
    decoder: Decoder
    end_ids: frozenset[int]
    watcher: StopWatcher
    max_tokens: int | None
    logprobs: Callable[[int], tuple[float, TopLogprobs]] | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None

    def __iter__(self) -> Iterator[tuple[str, list[TokenInfo]]]:
        decoded = 0  # characters so far, held-back ones included
        infos: list[TokenInfo] = []  # of text that has not been yielded
        unshown, stopped, ended = "", False, False
        with contextlib.closing(self.source):
            while True:
                try:
                    token = next(self.source)
                except StopIteration as end:
                    ended = end.value is True
                    break
                ended = token in self.end_ids
                if ended:
                    break
                if self.logprobs is not None:
                    infos.append(TokenInfo(token, decoded, *self.logprobs(token)))
                self.ids.append(token)
                text = self.decoder.push(token)
                decoded += len(text)
                unshown, stopped = self.watcher.push(text)
                if stopped or (self.max_tokens is not None and len(self.ids) >= self.max_tokens):
                    break
                if unshown:
                    self.text += unshown
                    n_ready = sum(info.offset < len(self.text) for info in infos)
                    ready, infos = infos[:n_ready], infos[n_ready:]
                    shown, unshown = unshown, ""
                    yield shown, ready
        if not stopped:
            last, stopped = self.watcher.push(self.decoder.finish())
            unshown += last if stopped else last + self.watcher.flush()
        self.text += unshown
        self.finish_reason = "stop" if ended or stopped else "length"
        if stopped:  # tokens of the stop string itself are not part of the answer
            infos = [info for info in infos if info.offset < len(self.text)]
        if unshown or infos:
            yield unshown, infos
