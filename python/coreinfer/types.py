"""Shapes of what `Llama` returns; names and keys are those llama-cpp-python and OpenAI use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypedDict

import numpy as np

from .core_sets import CoreSet

FinishReason = Literal["stop", "length"]


class CompletionLogprobs(TypedDict):
    """Parallel lists, one entry a token; offsets are in characters of prompt + completion."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(TypedDict):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CreateCompletionResponse(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage


class CreateCompletionStreamResponse(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]


class ChatCompletionTopLogprobToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatCompletionLogprobToken(ChatCompletionTopLogprobToken):
    top_logprobs: list[ChatCompletionTopLogprobToken]


class ChatCompletionLogprobs(TypedDict):
    content: list[ChatCompletionLogprobToken] | None
    refusal: None


class ChatCompletionRequestMessage(TypedDict, total=False):
    """One message: content is text, or OpenAI's list of text parts."""

    role: str
    content: str | list[dict[str, str]] | None
    name: str


class ChatCompletionResponseMessage(TypedDict):
    role: Literal["assistant"]
    content: str


class ChatCompletionResponseChoice(TypedDict):
    index: int
    message: ChatCompletionResponseMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: FinishReason | None


class CreateChatCompletionResponse(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionResponseChoice]
    usage: CompletionUsage


class ChatCompletionDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str


class ChatCompletionStreamChoice(TypedDict):
    index: int
    delta: ChatCompletionDelta
    logprobs: ChatCompletionLogprobs | None
    finish_reason: FinishReason | None


class CreateChatCompletionStreamResponse(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatCompletionStreamChoice]


@dataclass(frozen=True)
class Backend:
    """What computes: its name, the instruction set it chose, and its threads."""

    name: str
    isa: str
    n_threads: int
    description: str


@dataclass(frozen=True)
class LlamaState:
    """A `Llama`'s cache and core set, to go back to with `load_state`; plain data, picklable."""

    input_ids: np.ndarray  # int32 (n_tokens,)
    n_tokens: int
    llama_state: bytes = field(repr=False)  # megabytes
    llama_state_size: int
    seed: int
    core_set: CoreSet | None
    n_prompt: int | None = None  # tokens before the answer, where there is one
    prompt_text: str | None = None  # what they say, if it was given as text
