"""The tiny random llama that tests of Llama decode with, and how they load it."""

from __future__ import annotations

import itertools

from coreinfer import Llama
from make_synthetic_model import make_tiny_model

PROMPT = b"The river rose in the night, and by the morning the lower field was under water."
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tiny_llama(path) -> str:
    """A llama of 3 layers with 512 neurons and a context of 256 tokens."""
    more = {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.add_bos_token": True}
    make_tiny_model(path, "llama", "F32", extra_metadata=more)
    return str(path)


def load(path: str, **options) -> Llama:
    # Float32 activations: what is compared token for token must not hang on 8-bit rounding.
    return Llama(path, **{"verbose": False, "seed": 1, "f32_activations": True, **options})


def take(n: int, tokens) -> list[int]:
    return list(itertools.islice(tokens, n))
