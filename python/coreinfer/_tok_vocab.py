"""A GGUF file's vocabulary, checked: metadata in, tokens with types, scores, merges and ids out.

Nothing here tokenizes. Every array is checked against every other before it is used, so that the
rest of the tokenizer needs no checks of its own. Texts are ``str``; a token whose bytes are not
UTF-8 is held with Python's ``surrogateescape``, so that `Vocabulary.token_bytes` gives them back.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from .warning import warn

PREFIX = "tokenizer.ggml."
MODELS = ("gpt2", "llama")  # byte-level BPE, and SentencePiece's BPE with scores
LONGEST_TOKEN = 4096  # characters; those of real vocabularies stay below 300

_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, by `surrogateescape`
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Texts by which models mark the end of a turn, the end of a message, and (for code models) the
# end of a completion. Files often name no id for them. The order decides which one is `eot_id`.
_END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
)
_END_OF_MESSAGE = ("<|eom_id|>",)
_OTHER_ENDS = ("</s>", "<eos>", "[EOS]", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>")
# The first of each row that the vocabulary has ends a generation: padding, repository and file
# marks of fill-in-the-middle training.
_FILL_IN_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


class TokenizerError(ValueError):
    """A vocabulary that cannot be used, or a text or id that the vocabulary cannot take."""


class TokenType(IntEnum):
    """GGUF's ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Vocabulary:
    """Tokens by id, and what the file says about how to use them.

    ``ids[tokens[i]] == i`` for every id; `types` has one entry a token. `merges` (rank by
    position) belongs to model "gpt2" and `scores` (float32) to "llama"; the other one is None.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    merges: list[tuple[str, str]] | None = None
    scores: np.ndarray | None = None
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, unknown, eot, eom: id
    end_ids: frozenset[int] = frozenset()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read and check a vocabulary; `TokenizerError` names the key and what was wrong."""
        model = _text(metadata, "model")
        if model not in MODELS:
            known = ", ".join(repr(name) for name in MODELS)
            raise TokenizerError(
                f"{PREFIX}model is {model!r}, which is not supported; known: {known}"
            )
        tokens = _tokens(metadata)
        ids = {token: i for i, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            _raise_duplicate(tokens)
        vocabulary = cls(model, "", tokens, _types(metadata, tokens), ids)
        if model == "gpt2":
            vocabulary.pre = _pre(metadata)
            vocabulary.merges = _merges(metadata)
        else:
            vocabulary.scores = _scores(metadata, len(tokens))
        vocabulary._find_special(metadata)
        return vocabulary

    def token_bytes(self, index: int) -> bytes:
        """The token's text in the file, as bytes."""
        return self.tokens[index].encode("utf-8", "surrogateescape")

    def not_utf8(self) -> set[str]:
        """Tokens that no text can hold; they can be written out but never matched."""
        try:
            "".join(self.tokens).encode("utf-8")
        except UnicodeEncodeError:
            return {text for text in self.tokens if _ESCAPED.search(text)}
        return set()

    def byte_ids(self) -> list[int | None]:
        """The id of each byte's ``<0xNN>`` token, 256 entries, None where there is none."""
        found: list[int | None] = [None] * 256
        for index, kind in enumerate(self.types):
            if kind == TokenType.BYTE:
                found[int(self.tokens[index][3:5], 16)] = index
        return found

    def _find_special(self, metadata: Mapping[str, Any]) -> None:
        defaults = {"bos": 1, "eos": 2, "unknown": 0} if self.model == "llama" else {}
        n_vocab = len(self.tokens)
        for name in ("bos", "eos", "unknown", "eot", "eom", *_FILL_IN_ENDS):
            given = _token_id(metadata, f"{name}_token_id", n_vocab)
            if given is None and defaults.get(name, n_vocab) < n_vocab:
                given = defaults[name]
            if given is not None:
                self.special[name] = given
        marks = {
            text: self._marker(text) for text in (*_END_OF_TURN, *_END_OF_MESSAGE, *_OTHER_ENDS)
        }
        ends = {index for index in marks.values() if index is not None}
        for name, texts in {"eot": _END_OF_TURN, "eom": _END_OF_MESSAGE, **_FILL_IN_ENDS}.items():
            found = [i for text in texts if (i := self._marker(text)) is not None]
            if name not in self.special and found:
                self.special[name] = found[0]
                ends.add(found[0])
        for index in ends:
            self.types[index] = TokenType.CONTROL  # some files give these marks as plain text
        named = ("eos", "eot", "eom", *_FILL_IN_ENDS)
        self.end_ids = frozenset(ends.union(self.special[n] for n in named if n in self.special))

    def _marker(self, text: str) -> int | None:
        """The id of `text` where it is a mark and not ordinary text that merges can build."""
        index = self.ids.get(text)
        if index is None or self.types[index] != TokenType.NORMAL or self.merges is None:
            return index
        return None if any(a + b == text for a, b in self.merges) else index


def _value(metadata: Mapping[str, Any], key: str) -> Any:
    try:
        return metadata[PREFIX + key]
    except KeyError:
        raise TokenizerError(
            f"the file has no {PREFIX}{key}; it holds no usable vocabulary"
        ) from None


def _text(metadata: Mapping[str, Any], key: str) -> str:
    value = _value(metadata, key)
    if not isinstance(value, str):
        raise TokenizerError(f"{PREFIX}{key} must be a string, found {type(value).__name__}")
    return value


def _pre(metadata: Mapping[str, Any]) -> str:
    if PREFIX + "pre" in metadata and (name := _text(metadata, "pre")):
        return name
    warn(
        f"the file names no pre-tokenizer ({PREFIX}pre); 'default' is used, which may split text "
        "in other places than the model was trained with"
    )
    return "default"


def _list(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = _value(metadata, key)
    if isinstance(value, np.ndarray):
        if value.ndim == 1:
            return value.tolist()
    elif isinstance(value, (list, tuple)):
        return list(value)
    raise TokenizerError(f"{PREFIX}{key} must be an array, found {type(value).__name__}")


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = _list(metadata, "tokens")
    if not tokens:
        raise TokenizerError(f"{PREFIX}tokens is empty")
    for index, token in enumerate(tokens):
        if isinstance(token, bytes):
            tokens[index] = token = token.decode("utf-8", "surrogateescape")
        elif not isinstance(token, str):
            kind = type(token).__name__
            raise TokenizerError(f"{PREFIX}tokens[{index}] must be a string, found {kind}")
        if len(token) > LONGEST_TOKEN:
            raise TokenizerError(
                f"{PREFIX}tokens[{index}] has {len(token)} characters, above {LONGEST_TOKEN}"
            )
        if not token:
            tokens[index] = f"[EMPTY_{index}]"
    try:
        "".join(tokens).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise TokenizerError(f"{PREFIX}tokens holds a lone surrogate: {error}") from None
    return tokens


def _raise_duplicate(tokens: list[str]) -> None:
    first: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if first.setdefault(token, index) != index:
            raise TokenizerError(
                f"{PREFIX}tokens: ids {first[token]} and {index} are both {token!r}"
            )


def _types(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    if PREFIX + "token_type" not in metadata:
        return [TokenType.NORMAL] * len(tokens)
    types = _list(metadata, "token_type")
    _check_length("token_type", types, len(tokens))
    known = frozenset(int(kind) for kind in TokenType)
    if not known.issuperset(types):
        index = next(i for i, kind in enumerate(types) if kind not in known)
        raise TokenizerError(f"{PREFIX}token_type[{index}] is {types[index]!r}, expected 0 to 6")
    for index, kind in enumerate(types):
        if kind == TokenType.BYTE and not _BYTE_TOKEN.fullmatch(tokens[index]):
            raise TokenizerError(
                f"{PREFIX}tokens[{index}] is a byte token, expected <0x00> to <0xFF>, "
                f"found {tokens[index]!r}"
            )
    return types


def _scores(metadata: Mapping[str, Any], n_vocab: int) -> np.ndarray:
    values = _list(metadata, "scores")
    _check_length("scores", values, n_vocab)
    try:
        scores = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{PREFIX}scores must hold numbers: {error}") from None
    if np.isnan(scores).any():
        raise TokenizerError(f"{PREFIX}scores[{int(np.isnan(scores).argmax())}] is not a number")
    return scores


def _check_length(key: str, values: list[Any], n_vocab: int) -> None:
    if len(values) != n_vocab:
        raise TokenizerError(
            f"{PREFIX}{key} has {len(values)} entries, expected {n_vocab} as {PREFIX}tokens has"
        )


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = _list(metadata, "merges")
    merges = [tuple(line.split(" ")) if isinstance(line, str) else () for line in lines]
    for index, pair in enumerate(merges):
        if len(pair) != 2 or not pair[0] or not pair[1]:
            raise TokenizerError(
                f"{PREFIX}merges[{index}] must be two pieces with one space between, "
                f"found {lines[index]!r}"
            )
    return list(dict.fromkeys(merges))  # type: ignore[arg-type]  # a pair's first rank counts


def _token_id(metadata: Mapping[str, Any], key: str, n_vocab: int) -> int | None:
    value = metadata.get(PREFIX + key)
    if value is None:
        return None
    try:
        index = operator.index(value)
    except TypeError:
        index = -1
    if isinstance(value, (bool, np.bool_)) or not 0 <= index < n_vocab:
        raise TokenizerError(f"{PREFIX}{key} is {value!r}, expected an id from 0 to {n_vocab - 1}")
    return index


def flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    """A boolean of the tokenizer's metadata, or `default` where the file has none."""
    value = metadata.get(PREFIX + key, default)
    if not isinstance(value, (bool, np.bool_)):
        raise TokenizerError(f"{PREFIX}{key} must be true or false, found {value!r}")
    return bool(value)


def unused_name(names: Container[str]) -> str:
    """A name for a token that no text may match: not in `names`, and never made of one character.

    Merges make only tokens that they name, so no text becomes a token of two or more characters
    that stands in no merge.
    """
    name = "\x00\x00"
    while name in names:
        name += "\x00"
    return name
