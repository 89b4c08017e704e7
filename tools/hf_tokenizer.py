"""tokenizer.json and tokenizer_config.json -> GGUF's tokenizer metadata.

Two families: byte-level BPE (GGUF's "gpt2", told apart by pre-tokenizer), and BPE with byte
fallback that came from SentencePiece (GGUF's "llama", whose scores are rebuilt from the merges).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_checkpoint import CheckpointError, read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CAPITAL, _SMALL = (rf"[\p{{{kind}}}\p{{Lm}}\p{{Lo}}\p{{M}}]" for kind in (r"Lu}\p{Lt", "Ll"))
_BY_CASE = "|".join(
    rf"[^\r\n\p{{L}}\p{{N}}]?{word}(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    for word in (f"{_CAPITAL}*{_SMALL}+", f"{_CAPITAL}+{_SMALL}*")
)
SPLIT_PATTERNS = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
    _BY_CASE + r"|\p{N}{1,3}" + _REST.replace(r"[\r\n]*|\s*", r"[\r\n/]*|\s*"): "gpt-4o",
}


def tokenizer_fields(directory: Path, n_vocab: int, config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's metadata for a model with `n_vocab` embedding rows.

    Rows beyond the tokenizer's own tokens become unused tokens. CheckpointError says what in
    tokenizer.json is not supported.
    """
    path = directory / "tokenizer.json"
    tokenizer = read_json(path)
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"{path}: model type {model.get('type')!r} is not supported, expected BPE"
        )
    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens, types = _tokens(path, tokenizer, n_vocab)
    ids = {token: i for i, token in enumerate(tokens)}
    fields: dict[str, Any] = {}
    if model.get("byte_fallback"):
        fields |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": _scores(tokens, model["merges"]),
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.add_space_prefix": _adds_space(tokenizer),
        }
    else:
        fields |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_tokenizer(path, tokenizer),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": merges,
        }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        fields[f"tokenizer.ggml.{key}_token_id"] = _special_id(name, settings, config, ids)
    first, last = _template_ends(tokenizer.get("post_processor"))
    if first is None and last is None:
        add_bos, add_eos = settings.get("add_bos_token"), settings.get("add_eos_token")
    else:
        add_bos = ids.get(first) is not None
        add_eos = ids.get(last) is not None
        if add_bos:
            fields["tokenizer.ggml.bos_token_id"] = ids[first]
    fields["tokenizer.ggml.add_bos_token"] = bool(add_bos)
    fields["tokenizer.ggml.add_eos_token"] = bool(add_eos)
    fields["tokenizer.chat_template"] = _chat_template(directory, settings)
    return fields


def _tokens(path: Path, tokenizer: dict[str, Any], n_vocab: int) -> tuple[list[str], list[int]]:
    model, added = tokenizer["model"], tokenizer.get("added_tokens", [])
    by_id = {i: token for token, i in model["vocab"].items()}
    by_id |= {entry["id"]: entry["content"] for entry in added}
    if by_id and max(by_id) >= n_vocab:
        raise CheckpointError(
            f"{path}: token id {max(by_id)} has no embedding, the model has {n_vocab} rows"
        )
    special = {entry["id"]: CONTROL if entry["special"] else USER_DEFINED for entry in added}
    tokens, types = [], []
    for i in range(n_vocab):
        token = by_id.get(i, f"[PAD{i}]")
        kind = NORMAL if i in by_id else UNUSED
        if model.get("byte_fallback"):
            if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                kind = BYTE
            elif token == model.get("unk_token"):
                kind = UNKNOWN
        if kind != UNKNOWN:
            kind = special.get(i, kind)
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Minus the rank of the first merge that makes a token; tokens no merge makes come last."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        rank.setdefault(left + right, i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, a Sequence opened up."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    if any(
        step["type"] == "Prepend" for step in _steps(tokenizer.get("normalizer"), "normalizers")
    ):
        return True
    return any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    )


def _pre_tokenizer(path: Path, tokenizer: dict[str, Any]) -> str:
    """GGUF's name of a byte-level pre-tokenizer, recognised by its exact steps."""
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    normalizers = [step["type"] for step in _steps(tokenizer.get("normalizer"), "normalizers")]
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        own_regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own_regex and not normalizers:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and own_regex and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not own_regex:
            name = SPLIT_PATTERNS.get(steps[0]["pattern"].get("Regex", ""))
            if name == "llama-bpe" and not tokenizer["model"].get("ignore_merges"):
                return "smaug-bpe"  # the same words, but one that is a token is merged, too
            if (
                name in ("llama-bpe", "gpt-4o")
                and not normalizers
                or name == "qwen2"
                and normalizers in ([], ["NFC"])
            ):
                return name
    raise CheckpointError(
        f"{path}: pre-tokenizer {kinds} with normalizers {normalizers} is none "
        f"of the known ones (gpt-2, smollm, llama-bpe, smaug-bpe, gpt-4o, qwen2)"
    )


def _special_id(
    name: str, settings: dict[str, Any], config: dict[str, Any], ids: dict[str, int]
) -> int | None:
    token = settings.get(f"{name}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token in ids:
        return ids[token]
    found = config.get(f"{name}_token_id")
    return found[0] if isinstance(found, list) else found


def _template_ends(post: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """The special tokens that a post-processor puts first and last around a text."""
    for step in _steps(post, "processors"):
        if step["type"] == "TemplateProcessing":
            ends = step["single"][0], step["single"][-1]
            first, last = (end.get("SpecialToken", {}).get("id") for end in ends)
            return first, last
    return None, None


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template
