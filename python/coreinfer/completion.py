"""Completions and chat answers in the shapes llama-cpp-python returns.

Flows in: a `Request` made by `Llama`'s methods. Flows out: response dictionaries, whole or as a
stream of chunks. Generation itself is `TokenModel.generate_ids`; text is `text_stream`'s.
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .text_stream import TextStream, TokenInfo, TopLogprobs
from .types import (
    ChatCompletionLogprobs,
    ChatCompletionLogprobToken,
    ChatCompletionTopLogprobToken,
    CompletionLogprobs,
    CompletionUsage,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
    CreateCompletionResponse,
    CreateCompletionStreamResponse,
    FinishReason,
)

if TYPE_CHECKING:
    from .llama import Llama


@dataclass(frozen=True)
class Request:
    """A prompt, the stream that will answer it, and what the answer should report.

    `written`: `prompt_text` is what the caller wrote, names of special tokens included; otherwise
    it was made from the ids, which leaves them out.
    """

    llm: Llama
    prompt_ids: np.ndarray
    prompt_text: str
    stream: TextStream
    echo: bool
    n_logprobs: int | None
    written: bool = False

    def head(self, object_name: str, prefix: str) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{uuid.uuid4()}",
            "object": object_name,
            "created": int(time.time()),
            "model": self.llm.model_path,
        }

    def usage(self) -> CompletionUsage:
        n_prompt, n_new = len(self.prompt_ids), len(self.stream.ids)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
        }


# --- completions ---


def complete(request: Request) -> CreateCompletionResponse:
    """Run the request to its end."""
    head = request.head("text_completion", "cmpl")
    prompt_logprobs = _echoed_logprobs(request)
    infos: list[TokenInfo] = []
    for _, new in request.stream:
        infos.extend(new)
    text = request.stream.text
    return {
        **head,  # type: ignore[typeddict-item]
        "choices": [
            {
                "text": request.prompt_text + text if request.echo else text,
                "index": 0,
                "logprobs": _join(prompt_logprobs, _completion_logprobs(request, infos)),
                "finish_reason": request.stream.finish_reason,
            }
        ],
        "usage": request.usage(),
    }


def stream_completion(request: Request) -> Iterator[CreateCompletionStreamResponse]:
    """The request as chunks; the last one carries the finish reason."""
    head = request.head("text_completion", "cmpl")

    def chunk(
        text: str, logprobs: CompletionLogprobs | None, reason: FinishReason | None
    ) -> CreateCompletionStreamResponse:
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}  # type: ignore[typeddict-item]

    if request.echo:
        yield chunk(request.prompt_text, _echoed_logprobs(request), None)
    for text, infos in request.stream:
        yield chunk(text, _completion_logprobs(request, infos), None)
    yield chunk("", None, request.stream.finish_reason)


def _token_text(llm: Llama, token: int, special: bool = False) -> str:
    return llm.tokenizer().token_bytes(token, special).decode("utf-8", errors="ignore")


def _top_by_text(
    llm: Llama, top: TopLogprobs, token: int, logprob: float, special: bool = False
) -> dict[str, float]:
    by_text: dict[str, float] = {}
    for candidate, value in top:
        # The likelier of equal texts.
        by_text.setdefault(_token_text(llm, candidate, special), value)
    by_text[_token_text(llm, token, special)] = logprob
    return by_text


_LOOK_AHEAD = 16  # bytes of a prompt that tokens may leave out in one place


def _beginnings(raw: bytes, pieces: Sequence[bytes]) -> list[int]:
    """Where each token's bytes begin in a prompt, in whole characters of its text.

    What the tokenizer puts in (a space before the text, an end token) begins where it stands and
    takes no room; what it leaves out (white space behind some special tokens) is skipped.
    """
    characters = [0]  # complete before byte i
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in range(len(raw)):
        characters.append(characters[-1] + len(decoder.decode(raw[i : i + 1])))
    at, beginnings = 0, []
    for piece in pieces:
        if not raw.startswith(piece, at):
            if piece[:1] == b" " and raw.startswith(piece[1:], at):
                piece = piece[1:]
            else:
                found = raw.find(piece, at, at + _LOOK_AHEAD + len(piece))
                at, piece = (at, b"") if found < 0 else (found, piece)
        beginnings.append(characters[at])
        at += len(piece)
    return beginnings


def _completion_logprobs(request: Request, infos: list[TokenInfo]) -> CompletionLogprobs | None:
    if request.n_logprobs is None:
        return None
    llm, base = request.llm, len(request.prompt_text)
    return {
        "text_offset": [base + info.offset for info in infos],
        "token_logprobs": [info.logprob for info in infos],
        "tokens": [_token_text(llm, info.token) for info in infos],
        "top_logprobs": [_top_by_text(llm, i.top, i.token, i.logprob) for i in infos],
    }


def _echoed_logprobs(request: Request) -> CompletionLogprobs | None:
    """Log-probabilities of the prompt's own tokens; the first has none.

    A BOS that is not in the text, because the tokenizer put it there, is left out.
    """
    if not request.echo or request.n_logprobs is None:
        return None
    llm, ids = request.llm, request.prompt_ids
    rows = llm.prompt_logprobs(ids, request.n_logprobs)
    out: CompletionLogprobs = {
        "text_offset": [],
        "token_logprobs": [],
        "tokens": [],
        "top_logprobs": [],
    }
    tokenizer, special = llm.tokenizer(), request.written
    own_bos = int(ids[0]) == tokenizer.bos_id and not (special and not tokenizer.add_bos)
    first = 1 if own_bos and len(ids) > 1 else 0
    raw = request.prompt_text.encode() if special else llm.detokenize(ids)
    shown = [int(token) for token in ids[first:]]
    pieces = [tokenizer.token_bytes(token, special) for token in shown]
    out["text_offset"] = _beginnings(raw, pieces)
    for position, token in enumerate(shown, first):
        out["tokens"].append(_token_text(llm, token, special))
        if position == first:
            out["token_logprobs"].append(None)
            out["top_logprobs"].append(None)
        else:
            logprob, top = rows[position - 1]
            out["token_logprobs"].append(logprob)
            out["top_logprobs"].append(_top_by_text(llm, top, token, logprob, special))
    return out


def _join(a: CompletionLogprobs | None, b: CompletionLogprobs | None) -> CompletionLogprobs | None:
    if a is None or b is None:
        return b
    return {
        "text_offset": a["text_offset"] + b["text_offset"],
        "token_logprobs": a["token_logprobs"] + b["token_logprobs"],
        "tokens": a["tokens"] + b["tokens"],
        "top_logprobs": a["top_logprobs"] + b["top_logprobs"],
    }


# --- chat ---


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their content as one text; ValueError for what is not text."""
    if isinstance(messages, (str, bytes)) or not messages:
        raise ValueError(
            f"messages is {messages!r}; expected a list of messages with role and content"
        )
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {i} is {message!r}; expected a mapping with role and content"
            )
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = "".join(_text_part(i, part) for part in content)
        if content is None:
            content = ""
        if not isinstance(content, str):
            raise ValueError(
                f"the content of message {i} is {type(content).__name__}; expected text"
            )
        plain.append({**message, "content": content})
    return plain


def last_question(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """What the user said last, None if nothing: a conversation's cluster is chosen by that."""
    said = [m["content"] for m in plain_messages(messages) if m["role"] == "user"]
    return said[-1] if said else None


def _text_part(i: int, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ValueError(f"message {i} has a part of type {kind!r}; only text is supported")
    return str(part.get("text", ""))


def chat(request: Request) -> CreateChatCompletionResponse:
    """Run a chat request to its end."""
    head = request.head("chat.completion", "chatcmpl")
    infos: list[TokenInfo] = []
    for _, new in request.stream:
        infos.extend(new)
    return {
        **head,  # type: ignore[typeddict-item]
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": request.stream.text},
                "logprobs": _chat_logprobs(request, infos),
                "finish_reason": request.stream.finish_reason,
            }
        ],
        "usage": request.usage(),
    }


def stream_chat(request: Request) -> Iterator[CreateChatCompletionStreamResponse]:
    """A chat request as chunks: the role, then text, then the finish reason."""
    head = request.head("chat.completion.chunk", "chatcmpl")

    def chunk(
        delta: dict[str, str],
        logprobs: ChatCompletionLogprobs | None = None,
        reason: FinishReason | None = None,
    ) -> CreateChatCompletionStreamResponse:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}  # type: ignore[typeddict-item]

    yield chunk({"role": "assistant"})
    for text, infos in request.stream:
        yield chunk({"content": text}, _chat_logprobs(request, infos))
    yield chunk({}, None, request.stream.finish_reason)


def _chat_logprobs(request: Request, infos: list[TokenInfo]) -> ChatCompletionLogprobs | None:
    if request.n_logprobs is None:
        return None
    content: list[ChatCompletionLogprobToken] = [
        {
            **_chat_token(request.llm, info.token, info.logprob),
            "top_logprobs": [_chat_token(request.llm, t, p) for t, p in info.top],
        }
        for info in infos
    ]
    return {"content": content, "refusal": None}


def _chat_token(llm: Llama, token: int, logprob: float) -> ChatCompletionTopLogprobToken:
    raw = llm.tokenizer().token_bytes(token)
    text = raw.decode("utf-8", errors="ignore")
    return {"token": text, "logprob": logprob, "bytes": list(raw)}
