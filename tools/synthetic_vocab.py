"""A small byte-level BPE vocabulary for synthetic models, of any size asked for.

256 byte tokens, merges learnt from a few sentences, three control tokens, then unused fillers.
It is a real vocabulary: every byte string can be encoded, and every id can be decoded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

TEXT = """
The river rose in the night, and by the morning the lower field was under water. The children
stood on the bank and threw stones at a floating door. Nobody knew where the door had come from,
but there was a house somewhere without one. In the afternoon the water began to fall, and the
men of the village went down with ropes and hooks to see what could be saved from the mud. They
found three chairs, a clock that had stopped at ten, and the sign of the inn. The clock was taken
to the school, where the teacher set it going again, and it has told the time there ever since.
"""

NORMAL, CONTROL, UNUSED = 1, 3, 5  # token types, as GGUF numbers them
N_CONTROL = 3
MAX_MERGES = 200


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, their types, the merges by rank, and the ids of the control tokens."""

    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    bos_id: int
    eos_id: int
    pad_id: int


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE, by byte value."""
    keep = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = iter(range(0x100, 0x200))
    return [chr(byte) if byte in keep else chr(next(rest)) for byte in range(256)]


@cache
def learn_merges(text: str = TEXT, limit: int = MAX_MERGES) -> tuple[tuple[str, str], ...]:
    """Most frequent pair first, ties by text order of the pair; pairs seen once are not merged."""
    symbols = byte_symbols()
    words = Counter(text.split())
    split = {
        word: [symbols[byte] for byte in f" {word}".encode()] for word in words
    }  # a word with the space before it
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        for parts in split.values():
            at = 0
            while at + 1 < len(parts):
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1
    return tuple(merges)


def make_vocabulary(n_vocab: int) -> Vocabulary:
    """A vocabulary of exactly `n_vocab` tokens (at least 259: the bytes and three controls)."""
    if n_vocab < 256 + N_CONTROL:
        raise ValueError(
            f"n_vocab must be at least {256 + N_CONTROL} (bytes and control tokens), got {n_vocab}"
        )
    merges = learn_merges()[: n_vocab - 256 - N_CONTROL]
    tokens = [*byte_symbols(), *("".join(pair) for pair in merges)]
    types = [NORMAL] * len(tokens)
    bos_id = len(tokens)
    tokens += ["<|bos|>", "<|eos|>", "<|pad|>"]
    types += [CONTROL] * N_CONTROL
    n_filler = n_vocab - len(tokens)
    tokens += [f"<|unused_{i}|>" for i in range(n_filler)]
    types += [UNUSED] * n_filler
    return Vocabulary(
        tokens, types, [" ".join(pair) for pair in merges], bos_id, bos_id + 1, bos_id + 2
    )


def vocabulary_fields(
    vocabulary: Vocabulary, *, add_bos: bool, pre: str = "gpt-2"
) -> dict[str, Any]:
    """The tokenizer's metadata; `pre` names the pre-tokenizer."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.token_types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": vocabulary.bos_id,
        "tokenizer.ggml.eos_token_id": vocabulary.eos_id,
        "tokenizer.ggml.padding_token_id": vocabulary.pad_id,
        "tokenizer.ggml.add_bos_token": add_bos,
    }
