"""Completions and chat answers in the shapes llama-cpp-python returns.

Flows in: a `Request` made by `Llama`'s methods. Flows out: response dictionaries, whole or as a
stream of chunks. Generation itself is `Llama.generate`; text handling is `text_stream`.
"""

from __future__ import annotations

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
    """A prompt, the stream that will answer it, and what the answer should report."""

    llm: Llama
    prompt_ids: np.ndarray
    prompt_text: str
    stream: TextStream
    echo: bool
    n_logprobs: int | None

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


def _token_text(llm: Llama, token: int) -> str:
    return llm.tokenizer().token_bytes(token).decode("utf-8", errors="ignore")


def _top_by_text(llm: Llama, top: TopLogprobs, token: int, logprob: float) -> dict[str, float]:
    by_text: dict[str, float] = {}
    for candidate, value in top:
        by_text.setdefault(_token_text(llm, candidate), value)  # the likelier of equal texts
    by_text[_token_text(llm, token)] = logprob
    return by_text


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
    """Log-probabilities of the prompt's own tokens; the first has none. A BOS is left out."""
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
    skip_bos = len(ids) > 1 and int(ids[0]) == llm.token_bos()
    decoder = llm.tokenizer().stream_decoder()
    offset = 0
    for position, token in enumerate(map(int, ids)):
        text = "" if skip_bos and position == 0 else decoder.push(token)
        if skip_bos and position == 0:
            continue
        out["text_offset"].append(offset)
        out["tokens"].append(_token_text(llm, token))
        first = not out["token_logprobs"]
        logprob, top = rows[position - 1] if position > 0 else (None, [])
        if first or logprob is None:
            out["token_logprobs"].append(None)
            out["top_logprobs"].append(None)
        else:
            out["token_logprobs"].append(logprob)
            out["top_logprobs"].append(_top_by_text(llm, top, token, logprob))
        offset += len(text)
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
