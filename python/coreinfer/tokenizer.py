"""Tokenization from a GGUF file's own metadata: text or bytes to ids, ids to bytes, and streaming.

`Tokenizer.from_metadata` takes the metadata dict; ids are those of llama.cpp. `chat.py` makes
prompts from messages; this file knows neither models nor templates. Three rules beyond
llama.cpp's, all so that ``detokenize(tokenize(x)) == x``:

* a byte that is not part of well-formed UTF-8 becomes the token of that byte, and comes back;
* so does U+2581 in SentencePiece vocabularies, which otherwise comes back as a space;
* text never merges into a control token in SentencePiece vocabularies.

The regular expressions that cut words know the code points of the installed ``tokenizers``; those
assigned after Unicode 15.0 may be cut in other places than llama.cpp does.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ._tok_bpe import WHOLE_WORDS_FIRST, ByteLevel
from ._tok_spm import SPACE, SentencePiece
from ._tok_vocab import TokenizerError, TokenType, Vocabulary, flag

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerError"]

_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")
_SPACE_BYTES = SPACE.encode("utf-8")
_ESCAPED_SPACE = _SPACE_BYTES.decode("ascii", "surrogateescape")


class Tokenizer:
    """A vocabulary with its rules; immutable after construction, so threads may share it.

    Attributes
    ----------
    n_vocab : int
        Number of tokens; ids are 0 to ``n_vocab - 1``.
    bos_id, eos_id, eot_id, eom_id, unknown_id : int or None
        Begin and end of text, end of turn, end of message, unknown.
    end_ids : frozenset of int
        Every id that ends a generation.
    add_bos, add_eos : bool
        Whether the model asks for a BOS before, an EOS after a text.
    """

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        self._types = vocabulary.types
        self._texts = vocabulary.tokens
        self.n_vocab = len(vocabulary.tokens)
        special = vocabulary.special
        self.bos_id, self.eos_id = special.get("bos"), special.get("eos")
        self.eot_id, self.eom_id = special.get("eot"), special.get("eom")
        self.unknown_id = special.get("unknown")
        self.end_ids = vocabulary.end_ids
        scores = vocabulary.model == "llama"
        asks = scores or vocabulary.pre in WHOLE_WORDS_FIRST
        self.add_bos = flag(metadata, "add_bos_token", asks)
        self.add_eos = flag(metadata, "add_eos_token", False)
        for name, wanted in (("bos", self.add_bos), ("eos", self.add_eos)):
            if wanted and name not in special:
                raise TokenizerError(
                    f"the model asks for {name.upper()} to be added to texts, but its metadata has "
                    f"no tokenizer.ggml.{name}_token_id"
                )
        self._add_space = flag(metadata, "add_space_prefix", True) and scores
        self._engine = SentencePiece(vocabulary) if scores else ByteLevel(vocabulary)
        # A literal U+2581 is kept apart from the spaces it stands for, where that can be written.
        byte_ids = vocabulary.byte_ids()
        self._keep_space_sign = scores and all(byte_ids[b] is not None for b in _SPACE_BYTES)
        self._pieces: dict[int, bytes] = {}
        marked = [
            (-len(vocabulary.token_bytes(i)), i)
            for i, kind in enumerate(self._types)
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        ]
        self._marked = [(self._texts[i], i) for _, i in sorted(marked)]
        self._user_defined = [
            (t, i) for t, i in self._marked if self._types[i] == TokenType.USER_DEFINED
        ]
        self._strips_after = _strips_after(metadata, self._marked)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str | None = None) -> Tokenizer:
        """Build from GGUF metadata (keys ``tokenizer.ggml.*``).

        Values are Python scalars, ``str``, and lists or numpy arrays; tokens may be ``bytes``.
        Errors begin with the `path` of the file, if given.

        Raises
        ------
        TokenizerError
            Model or pre-tokenizer unknown (the message lists those known), or metadata missing,
            malformed or contradictory.
        """
        try:
            return cls(Vocabulary.from_metadata(metadata), metadata)
        except TokenizerError as error:
            if path is None:
                raise
            raise TokenizerError(f"{path}: {error}") from error

    def tokenize(self, text: bytes | str, add_bos: bool = True, special: bool = False) -> list[int]:
        """Ids of `text`.

        Parameters
        ----------
        text : bytes or str
            Bytes need not be UTF-8; a ``str`` may hold bytes in ``surrogateescape`` form.
        add_bos : bool
            Put BOS before and EOS after, each only if the model asks for it (`add_bos`,
            `add_eos`).
        special : bool
            Read the texts of control tokens in `text` as those tokens. User-defined tokens are
            always read.
        """
        ids: list[int] = []
        if add_bos and self.add_bos:
            ids.append(self.bos_id)  # type: ignore[arg-type]  # checked at construction
        space = self._add_space  # before the text, and again after every special token
        for part in self._partition(_as_text(text), special):
            if isinstance(part, int):
                ids.append(part)
                space = self._add_space
            else:
                ids += self._encode(" " + part if space else part)
                space = False
        if add_bos and self.add_eos:
            ids.append(self.eos_id)  # type: ignore[arg-type]
        return ids

    def detokenize(self, ids: Sequence[int], special: bool = False) -> bytes:
        """Bytes of `ids`; control tokens give nothing unless `special`.

        The space that `tokenize` puts before a text is taken away again after a leading BOS. Ids
        without BOS are taken as the continuation of a text, and keep it.
        """
        pieces = []
        drop_space = False
        for position, id in enumerate(ids):
            piece, drop_space = self._written(id, special, drop_space)
            drop_space |= self._add_space and position == 0 and id == self.bos_id
            pieces.append(piece)
        return b"".join(pieces)

    def token_bytes(self, id: int, special: bool = False) -> bytes:
        """Bytes of one token, wherever it stands; control tokens give b"" unless `special`."""
        kind = self._types[self._checked(id)]
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN) and not special:
            return b""
        piece = self._pieces.get(id)
        if piece is None:
            piece = self._pieces[id] = self._piece(id, kind)
        return piece

    def _piece(self, id: int, kind: int) -> bytes:
        text = self._texts[id]
        if kind == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            return text.encode("utf-8", "surrogateescape")
        return self._engine.piece(id)

    def stream_decoder(self, special: bool = False) -> StreamDecoder:
        """A decoder for ids that come one by one, as the continuation of a text."""
        return StreamDecoder(self, special)

    def _checked(self, id: int) -> int:
        if not 0 <= id < self.n_vocab:
            raise TokenizerError(f"token id {id} is outside 0 to {self.n_vocab - 1}")
        return id

    def _written(self, id: int, special: bool, drop_space: bool) -> tuple[bytes, bool]:
        """The bytes to write for `id`, and whether the space that may follow is to be dropped."""
        piece = self.token_bytes(id, special)
        opens = self._opens_text(id, special)
        if drop_space and not opens and piece[:1] == b" ":
            piece = piece[1:]
        return piece, opens

    def _opens_text(self, id: int, special: bool) -> bool:
        """Whether `tokenize` puts a space of its own after this token."""
        kind = self._types[id]
        return self._add_space and (
            kind == TokenType.USER_DEFINED or (special and kind == TokenType.CONTROL)
        )

    def _partition(self, text: str, special: bool) -> list[str | int]:
        """Cut special tokens out of `text`: the longest first, each wherever it still occurs."""
        parts: list[str | int] = [text] if text else []
        letters = set(text)
        for mark, id in self._marked if special else self._user_defined:
            if mark[0] in letters and mark in text:
                parts = list(self._cut(parts, mark, id))
        return parts

    def _cut(self, parts: list[str | int], mark: str, id: int) -> Iterator[str | int]:
        for part in parts:
            if isinstance(part, int) or mark not in part:
                yield part
                continue
            for n, piece in enumerate(part.split(mark)):
                if n > 0:
                    yield id
                    if id in self._strips_after:
                        piece = piece.lstrip(" \t\n\v\f\r")
                if piece:
                    yield piece

    def _encode(self, text: str) -> list[int]:
        if self._keep_space_sign and SPACE in text:
            text = text.replace(SPACE, _ESCAPED_SPACE)
        if text.isascii():
            return self._engine.encode(text)
        ids: list[int] = []
        for n, part in enumerate(_NOT_UTF8.split(text)):
            if n % 2:
                ids += self._engine.encode_bytes(part.encode("utf-8", "surrogateescape"))
            elif part:
                ids += self._engine.encode(part)
        return ids


class StreamDecoder:
    """Turns ids into text as they come, in whole characters.

    Bytes of an unfinished character are held back until it is whole; bytes that can never become
    one are given as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = False

    def push(self, id: int) -> str:
        """The text that is complete with this token; possibly empty."""
        piece, self._drop_space = self._tokenizer._written(id, self._special, self._drop_space)
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """U+FFFD if an unfinished character is left, else nothing; the decoder starts afresh."""
        self._drop_space = False
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text


def _as_text(text: bytes | str) -> str:
    """`text` as str in which bytes that are not UTF-8 are lone surrogates (``surrogateescape``)."""
    if isinstance(text, str):
        try:
            text.encode("utf-8")
            return text
        except UnicodeEncodeError:
            pass
        try:
            text = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text holds a lone surrogate: {error}") from None
    if not isinstance(text, (bytes, bytearray, memoryview)):
        raise TypeError(f"text must be bytes or str, found {type(text).__name__}")
    return bytes(text).decode("utf-8", "surrogateescape")


def _strips_after(metadata: Mapping[str, Any], marked: list[tuple[str, int]]) -> frozenset[int]:
    """Special tokens that swallow the white space behind them: those of models named Phi-3."""
    name = metadata.get("general.name")
    if not isinstance(name, str) or not re.search("phi-?3", name.lower()):
        return frozenset()
    return frozenset(i for text, i in marked if text not in ("<unk>", "<s>", "<|endoftext|>"))
