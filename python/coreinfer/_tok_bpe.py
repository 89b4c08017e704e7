"""Byte-level BPE (GGUF model "gpt2"): text to ids and ids to bytes, on the ``tokenizers`` library.

A regular expression, chosen by the file's pre-tokenizer name, cuts text into words; the bytes of
each word are merged by the rank of the file's merge list. Text comes without special tokens and
without lone surrogates: `tokenizer.Tokenizer` has cut those out.
"""

from __future__ import annotations

import itertools

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Pipeline

from ._tok_vocab import PREFIX, TokenizerError, Vocabulary, unused_name

_CONTRACTION = "'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
# Possessive loops where giving back could never help: a megabyte of spaces stays linear.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s"
_LINES = r"(?:[^\S\r\n]*+[\r\n]++)++|\s+(?!\S)|\s"
_WORDS_AND_LINES = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}++|%s| ?[^\s\p{L}\p{N}]++[\r\n]*+|" + _LINES
)
# Words break where capitals follow small letters (a to z only, as llama.cpp has it).
_NOT_SMALL, _NOT_CAPITAL = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_BY_CASE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?(?:{_NOT_SMALL}*{_NOT_CAPITAL}+|{_NOT_SMALL}+{_NOT_CAPITAL}*)%s"
    r"|%s| ?[^\s\p{L}\p{N}]++[\r\n/]*+|" + _LINES
)

# Patterns applied one after the other, each to the pieces the last one left.
_PATTERNS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "qwen2": (_WORDS_AND_LINES % r"\p{N}",),
    "llama-bpe": (_WORDS_AND_LINES % r"\p{N}{1,3}",),
    "tekken": (_BY_CASE % ("", r"\p{N}"),),  # Mistral's
    "gpt-4o": (_BY_CASE % (f"(?:{_CONTRACTION})?", r"\p{N}{1,3}"),),
    "default": (r"[\p{P}$+<=>^~|]++", _GPT2, r"\p{N}++", "[0-9][0-9][0-9]"),
}
# Other names for the same patterns.
_ALIASES = {
    "gpt-2": "phi-2 olmo mpt exaone4 jais trillion mellum a.x-4.0 gigachat granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "qwen2": "deepseek-r1-qwen stablelm2 hunyuan megrez solar-open grok-2 kormo f2llmv2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 smaug-bpe dbrx",
    "gpt-4o": "llama4 kanana2 talkie",
}
PRE_TOKENIZERS = {name: name for name in _PATTERNS} | {
    alias: name for name, aliases in _ALIASES.items() for alias in aliases.split()
}
# A word that is a token as a whole needs no merges, and texts begin with a BOS: Llama 3, Mistral.
WHOLE_WORDS_FIRST = {name for name, of in PRE_TOKENIZERS.items() if of in ("llama-bpe", "tekken")}
WHOLE_WORDS_FIRST -= {"smaug-bpe", "dbrx"}


def _byte_alphabet() -> list[str]:
    """The 256 visible characters by which byte-level vocabularies write bytes."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in enumerate(_BYTE_TO_CHAR)}


class ByteLevel:
    """GPT-2's scheme: a regular expression cuts words, bytes of a word merge by rank."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        if vocabulary.pre not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise TokenizerError(
                f"{PREFIX}pre is {vocabulary.pre!r}, an unknown pre-tokenizer; known: {known}"
            )
        assert vocabulary.merges is not None
        names = dict(vocabulary.ids)
        for text in vocabulary.not_utf8():
            del names[text]
        for index, (left, right) in enumerate(vocabulary.merges):
            if not (left in names and right in names and left + right in names):
                missing = next(p for p in (left, right, left + right) if p not in names)
                raise TokenizerError(
                    f"{PREFIX}merges: {left!r} and {right!r} (merge {index}) need the token "
                    f"{missing!r}, which the vocabulary lacks"
                )
        # A byte without a token becomes `_nothing`, which keeps its neighbours apart and is
        # dropped afterwards, as llama.cpp does.
        self._nothing = len(vocabulary.tokens)
        unknown = unused_name(names)
        names[unknown] = self._nothing
        self._pipeline = Pipeline(
            models.BPE(
                names,
                vocabulary.merges,
                unk_token=unknown,
                ignore_merges=vocabulary.pre in WHOLE_WORDS_FIRST,
            )
        )
        patterns = _PATTERNS[PRE_TOKENIZERS[vocabulary.pre]]
        self._pipeline.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._byte_ids = [vocabulary.ids.get(char) for char in _BYTE_TO_CHAR]
        self._tokens = vocabulary.tokens

    def encode(self, text: str) -> list[int]:
        ids = self._pipeline.encode(text, add_special_tokens=False).ids
        if None in self._byte_ids and self._nothing in ids:
            return [index for index in ids if index != self._nothing]
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        return [i for byte in data if (i := self._byte_ids[byte]) is not None]

    def piece(self, index: int) -> bytes:
        text = self._tokens[index]
        try:
            return bytes(map(_CHAR_TO_BYTE.__getitem__, text))
        except KeyError:  # text outside the byte alphabet
            return text.encode("utf-8", "surrogateescape")
