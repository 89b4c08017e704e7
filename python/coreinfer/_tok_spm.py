"""SentencePiece's BPE (GGUF model "llama"): text to ids and ids to bytes.

Of all neighbours, those whose joint token scores highest are merged first, the leftmost of equals;
what is left without a token is written as ``<0xNN>`` byte tokens. Where scores are distinct this
is a merge list in the order of scores, which the ``tokenizers`` library applies; where they tie
(some converters give every token the same score) `_leftmost_best` applies the rule itself. Text
comes without special tokens and without lone surrogates: `tokenizer.Tokenizer` has cut those out.
"""

from __future__ import annotations

import heapq

import numpy as np
from tokenizers import Tokenizer as Pipeline
from tokenizers import models

from ._tok_vocab import TokenizerError, TokenType, Vocabulary, unused_name

SPACE = "\u2581"  # how SentencePiece writes a space inside a token


class SentencePiece:
    """Always merge the two neighbours whose joint token scores highest."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokens = vocabulary.tokens
        self._byte_ids = vocabulary.byte_ids()
        self._unknown = vocabulary.special.get("unknown")
        # Text never becomes a control, unknown or byte token by merging.
        closed = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)
        opaque = vocabulary.not_utf8()
        self._ids = {
            text: index
            for text, index in vocabulary.ids.items()
            if vocabulary.types[index] not in closed and text not in opaque
        }
        # Characters that are part of a token but none themselves: they may merge, and where they
        # do not, they are written as bytes.
        self._parts = sorted(set().union(*self._ids) - self._ids.keys())
        merges, self._scores = self._merges(vocabulary)
        self._pipeline = None if self._scores else self._build(merges)

    def encode(self, text: str) -> list[int]:
        text = text.replace(" ", SPACE)
        if self._pipeline is None:
            return self._encode_ties(text)
        ids = self._pipeline.encode(text, add_special_tokens=False).ids
        n_vocab = len(self._tokens)
        if not ids or max(ids) < n_vocab:
            return ids
        result = []
        for index in ids:
            if index < n_vocab:
                result.append(index)
            elif index < n_vocab + len(self._parts):
                result += self.encode_bytes(self._parts[index - n_vocab].encode("utf-8"))
            else:
                result.append(self._no_byte("a character of the text"))
        return result

    def encode_bytes(self, data: bytes) -> list[int]:
        return [
            index if (index := self._byte_ids[byte]) is not None else self._no_byte(f"0x{byte:02X}")
            for byte in data
        ]

    def piece(self, index: int) -> bytes:
        return self._tokens[index].replace(SPACE, " ").encode("utf-8", "surrogateescape")

    def _no_byte(self, what: str) -> int:
        if self._unknown is None:
            raise TokenizerError(f"the vocabulary has no token for {what} and no unknown token")
        return self._unknown

    def _merges(
        self, vocabulary: Vocabulary
    ) -> tuple[list[tuple[str, str]], dict[str, float] | None]:
        """Every pair of pieces that makes a token, best score first; scores by token if any tie."""
        assert vocabulary.scores is not None
        pieces = self._ids.keys() | set(self._parts)
        merges, made = [], []
        for index in np.argsort(-vocabulary.scores, kind="stable").tolist():
            text = vocabulary.tokens[index]
            if text not in self._ids or self._is_cut_out(text, vocabulary.types[index]):
                continue
            before = len(merges)
            for cut in range(len(text) - 1, 0, -1):
                if text[:cut] in pieces and text[cut:] in pieces:
                    merges.append((text[:cut], text[cut:]))
            if len(merges) > before:
                made.append(index)
        if len(np.unique(vocabulary.scores[made])) == len(made):
            return merges, None
        return [], {vocabulary.tokens[index]: float(vocabulary.scores[index]) for index in made}

    @staticmethod
    def _is_cut_out(text: str, kind: int) -> bool:
        """Whether no text that comes here holds `text`; spaces are rewritten only here."""
        return kind == TokenType.USER_DEFINED and SPACE not in text

    def _build(self, merges: list[tuple[str, str]]) -> Pipeline:
        n_vocab = len(self._tokens)
        names = self._ids | {char: n_vocab + i for i, char in enumerate(self._parts)}
        for byte, index in enumerate(self._byte_ids):
            if index is not None:
                names[f"<0x{byte:02X}>"] = index
        unknown = unused_name(names)
        names[unknown] = n_vocab + len(self._parts)
        return Pipeline(
            models.BPE(names, merges, unk_token=unknown, fuse_unk=False, byte_fallback=True)
        )

    def _encode_ties(self, text: str) -> list[int]:
        assert self._scores is not None
        ids: list[int] = []
        for piece in _leftmost_best(text, self._scores):
            index = self._ids.get(piece)
            ids += self.encode_bytes(piece.encode("utf-8")) if index is None else [index]
        return ids


def _leftmost_best(text: str, scores: dict[str, float]) -> list[str]:
    """Merge the characters of `text` pair by pair: best score first, leftmost of equals."""
    pieces = list(text)
    after = list(range(1, len(pieces) + 1))  # each piece's right neighbour
    before = list(range(-1, len(pieces) - 1))
    queue: list[tuple[float, int, int, int]] = []  # (-score, left, right, length of both)

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(pieces):
            joint = pieces[left] + pieces[right]
            if (score := scores.get(joint)) is not None:
                heapq.heappush(queue, (-score, left, right, len(joint)))

    for left in range(len(pieces) - 1):
        offer(left, left + 1)
    while queue:
        _, left, right, length = heapq.heappop(queue)
        if not pieces[left] or not pieces[right]:
            continue
        if len(pieces[left]) + len(pieces[right]) != length:
            continue  # one of them has grown since
        pieces[left] += pieces[right]
        pieces[right] = ""
        after[left] = after[right]
        if after[right] < len(pieces):
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [piece for piece in pieces if piece]
