"""Llama: a GGUF model with llama-cpp-python's methods, and core neurons.

Text flows in and out here; ids, cache and neurons are `TokenModel`'s, response shapes are
`completion`'s, and what llama-cpp-python's other arguments mean is `foreign`'s.
"""

from __future__ import annotations

import inspect
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from . import _core, completion, foreign, models
from .chat import ChatTemplate, ChatTemplateError
from .completion import Request
from .config import (
    CHAT_TEMPERATURE,
    DEFAULT_CORE_MODE,
    CoreConfig,
    LoadConfig,
    SamplingConfig,
    cache_type,
)
from .core_choice import AnyClusters
from .core_sets import CoreSet
from .embedders import AnyEmbedder
from .text_stream import StopWatcher, TextStream
from .token_model import (
    LogitsProcessor,
    StoppingCriterion,
    TokenGenerator,
    TokenModel,
    Tokens,
)
from .tokenizer import Tokenizer
from .tuning import Tuning
from .types import (
    ChatCompletionRequestMessage,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
    CreateCompletionResponse,
    CreateCompletionStreamResponse,
)


class ModelPathError(FileNotFoundError, ValueError):
    """The model path does not exist."""


class Llama(TokenModel):
    """A model that generates text, dense or with the prompt's core neurons.

    Parameters
    ----------
    model_path
        A GGUF file (`coreinfer.resolve_model("smollm2")` gives the path of a known model).
    n_ctx, n_batch, n_threads, seed, type_k, type_v, memory_limit, activation, f32_activations
        See `coreinfer.config.LoadConfig`. `n_ctx=0` is the model's own length.
    n_gpu_layers, main_gpu, vram_limit
        0 computes on the CPU, -1 (or at least the model's layers) on that GPU, with at most
        `vram_limit` bytes of its memory; a RuntimeError where there is none.
    core
        "auto", "off" (dense), "stable", "similar", "exact", a `CoreConfig`, or a `CoreSet` to
        decode with whatever the prompt. "auto" uses what `coreinfer tune` measured to be within
        `max_kl` of dense decoding, and is "exact" otherwise: the text of dense decoding.
    preset
        "paper": the CoreInfer paper's settings, whatever the defaults are, for core="stable" (then
        the default) or "similar"; `beta` and the like change them.
    clusters
        For "similar": a file that `coreinfer cluster build` made with this model, or `Clusters`.
    embedder
        Instead of the one that the clusters name; see `coreinfer.embedders.as_embedder`.
    alpha, beta, ..., patch, prior
        Fields of the `CoreConfig`, for short: `Llama(..., core="stable", beta=0.2)`. None leaves
        what `core` and `preset` say; a ValueError where `core` does not look at it.
    tuning
        A file that `coreinfer tune` wrote; by default the one beside the model, if there is one.
    last_n_tokens_size
        Recent tokens that the repetition penalties look at.
    verbose
        Say on stderr, in one line, what computes.
    prefill_progress
        Called with (prompt tokens done, prompt tokens in all) while a prompt is read.
    **others
        llama-cpp-python's further arguments: no effect, one warning; unknown names: TypeError.

    Raises
    ------
    ModelPathError
        There is no such file (it is a FileNotFoundError and a ValueError).
    GGUFError
        The file is malformed or needs something that is not supported.
    ValueError
        An argument is out of its range, or asks for something that does not exist here.

    Notes
    -----
    One object serves one caller at a time; two objects may work in two threads. Ctrl-C stops
    within a token and leaves the object usable.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_ctx: int = LoadConfig.n_ctx,
        n_batch: int = LoadConfig.n_batch,
        n_threads: int | None = LoadConfig.n_threads,
        seed: int = LoadConfig.seed,
        type_k: str | int | None = None,
        type_v: str | int | None = None,
        memory_limit: int | str | None = LoadConfig.memory_limit,
        activation: str | None = LoadConfig.activation,
        f32_activations: bool = LoadConfig.f32_activations,
        n_gpu_layers: int = LoadConfig.n_gpu_layers,
        main_gpu: int = LoadConfig.main_gpu,
        vram_limit: int | str | None = LoadConfig.vram_limit,
        core: str | CoreConfig | CoreSet = DEFAULT_CORE_MODE,
        preset: str | None = None,
        clusters: AnyClusters | None = None,
        embedder: AnyEmbedder | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        statistic: str | None = None,
        layers: str | tuple[int, int | None] | None = None,
        first_layer: float | None = None,
        gamma: float | None = None,
        blend: float | None = None,
        max_kl: float | None = None,
        start: int | None = None,
        refresh: int | None = None,
        max_drafts: int | None = None,
        weighted: bool | None = None,
        patch: bool | int | None = None,
        prior: bool | None = None,
        tuning: str | os.PathLike[str] | Tuning | None = None,
        last_n_tokens_size: int = SamplingConfig.penalty_last_n,
        verbose: bool = True,
        prefill_progress: Callable[[int, int], None] | None = None,
        **others: Any,
    ) -> None:
        foreign.check_foreign("Llama", others, foreign.CONSTRUCTOR, _names(Llama.__init__))
        config = LoadConfig(
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_threads=n_threads,
            seed=seed,
            type_k=cache_type(type_k, LoadConfig.type_k),
            type_v=cache_type(type_v, LoadConfig.type_v),
            memory_limit=memory_limit,  # type: ignore[arg-type]  # text becomes a number
            activation=activation,
            f32_activations=f32_activations,
            n_gpu_layers=n_gpu_layers,
            main_gpu=main_gpu,
            vram_limit=vram_limit,  # type: ignore[arg-type]
        )
        if prefill_progress is not None and not callable(prefill_progress):
            raise TypeError(
                f"prefill_progress is {prefill_progress!r}; expected a callable of (tokens done, "
                "tokens in all)"
            )
        self._penalty_last_n = SamplingConfig(penalty_last_n=last_n_tokens_size).penalty_last_n
        self.verbose = verbose
        shorts = {
            "alpha": alpha,
            "beta": beta,
            "statistic": statistic,
            "layers": layers,
            "first_layer": first_layer,
            "gamma": gamma,
            "blend": blend,
            "max_kl": max_kl,
            "start": start,
            "refresh": refresh,
            "max_drafts": max_drafts,
            "weighted": weighted,
            "patch": patch,
            "prior": prior,
        }
        given = {name: value for name, value in shorts.items() if value is not None}
        if preset is not None:
            core = CoreConfig.preset(preset, "stable" if core == DEFAULT_CORE_MODE else core)
        core = core if isinstance(core, CoreSet) else CoreConfig.of(core)
        if isinstance(core, CoreSet) and given:
            raise ValueError(
                f"{', '.join(given)}: no effect, since core is a CoreSet; expected none"
            )
        if isinstance(core, CoreConfig):
            core = core.changed(**given)
        path = _existing(model_path)
        file = _core.GgufFile(os.fsencode(path))
        # Before the weights: what the vocabulary takes counts when a memory limit is planned.
        self.metadata: dict[str, Any] = file.metadata
        self._tokenizer = Tokenizer.from_metadata(self.metadata, path)
        super().__init__(
            path,
            file,
            config,
            core,
            prefill_progress,
            clusters=clusters,
            embedder=embedder,
            text_of=self._text,
            tuning=tuning,
        )
        self._chat_template: ChatTemplate | None = None
        if verbose:
            self._announce()

    def _announce(self) -> None:
        model, backend = self._open_engine().config, self.backend
        print(
            f"coreinfer: {model['architecture']}, {model['n_layer']} layers, context "
            f"{self.n_ctx()}; {backend.name} {backend.isa}, {backend.n_threads} threads",
            file=sys.stderr,
            flush=True,
        )

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: Sequence[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Llama:
        """A model from a Hugging Face repository; `filename` may be a pattern that fits one file.

        `kwargs` go to the constructor. `local_dir_use_symlinks` has no effect.

        Raises
        ------
        ImportError
            The extra `hub` is not installed.
        ValueError
            No file, or more than one, fits the pattern.
        """
        path = models.hub_file(
            repo_id, filename, additional_files or (), local_dir=local_dir, cache_dir=cache_dir
        )
        return cls(path, **kwargs)

    def __enter__(self) -> Llama:
        self._open_session()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        """Only asked for what there is not: says so of llama-cpp-python's, with what to do."""
        hint = foreign.ATTRIBUTES.get(name)
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
            + ("" if hint is None else f", which llama-cpp-python's has: {hint}"),
            name=name,
            obj=self,
        )

    def __getstate__(self) -> dict[str, Any]:
        """What loads the same model again; the text in the cache stays behind."""
        return {
            "model_path": self.model_path,
            "core": self.core,
            "clusters": self.clusters,
            "tuning": self._tuning,
            "embedder": self._choice.embedder,
            "last_n_tokens_size": self._penalty_last_n,
            "verbose": self.verbose,
            **vars(self._config),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # --- tokens ---

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """UTF-8 bytes to ids; `special` lets the text name control tokens."""
        return self._tokenizer.tokenize(text, add_bos=add_bos, special=special)

    def detokenize(
        self, tokens: Tokens, prev_tokens: Tokens | None = None, special: bool = False
    ) -> bytes:
        """Ids to bytes; with `prev_tokens`, the bytes that `tokens` add to them."""
        ids = self.checked_ids(tokens).tolist()
        if prev_tokens is None:
            return self._tokenizer.detokenize(ids, special=special)
        before = self.checked_ids(prev_tokens, "prev_tokens").tolist()
        skip = len(self._tokenizer.detokenize(before, special=special))
        return self._tokenizer.detokenize(before + ids, special=special)[skip:]

    def token_bos(self) -> int:
        """Id that begins a text, -1 if the model has none."""
        return -1 if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    def token_eos(self) -> int:
        """Id that ends a text, -1 if the model has none."""
        return -1 if self._tokenizer.eos_id is None else self._tokenizer.eos_id

    def token_nl(self) -> int:
        """Id of a line break, -1 if no single token is one."""
        ids = self._tokenizer.tokenize(b"\n", add_bos=False)
        return ids[-1] if ids and self._tokenizer.token_bytes(ids[-1]) == b"\n" else -1

    def tokenizer(self) -> Tokenizer:
        """The tokenizer built from the file's own vocabulary."""
        return self._tokenizer

    def prompt_ids(self, prompt: str | bytes | Tokens, add_bos: bool = True) -> np.ndarray:
        """Ids of a prompt as generations take it: special tokens read, BOS as the model asks.

        Raises ValueError if there is no id, an id is out of range, or they exceed the context.
        """
        self._open_session()
        if isinstance(prompt, (str, bytes)):
            prompt = self._tokenizer.tokenize(_utf8(prompt), add_bos=add_bos, special=True)
        return self.checked_prompt(prompt, "text, or a sequence of token ids")

    # --- ids ---

    def _sampling(self, **values: Any) -> SamplingConfig:
        return SamplingConfig(penalty_last_n=self._penalty_last_n, **values)

    def sample(
        self,
        top_k: int = SamplingConfig.top_k,
        top_p: float = SamplingConfig.top_p,
        min_p: float = SamplingConfig.min_p,
        typical_p: float = SamplingConfig.typical_p,
        temp: float = SamplingConfig.temperature,
        repeat_penalty: float = SamplingConfig.repeat_penalty,
        frequency_penalty: float = SamplingConfig.frequency_penalty,
        presence_penalty: float = SamplingConfig.presence_penalty,
        *,
        logit_bias: Mapping[int, float] | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        **others: Any,
    ) -> int:
        """Draw the token after the cache; the cache stays as it is."""
        foreign.check_foreign("sample", others, foreign.SAMPLING, _names(Llama.sample))
        sampling = self._sampling(
            temperature=temp,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            repeat_penalty=repeat_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            logit_bias=logit_bias,
        )
        return self.draw(sampling, _callables("logits_processor", logits_processor))

    def generate(
        self,
        tokens: str | bytes | Tokens,
        top_k: int = SamplingConfig.top_k,
        top_p: float = SamplingConfig.top_p,
        min_p: float = SamplingConfig.min_p,
        typical_p: float = SamplingConfig.typical_p,
        temp: float = SamplingConfig.temperature,
        repeat_penalty: float = SamplingConfig.repeat_penalty,
        reset: bool = True,
        frequency_penalty: float = SamplingConfig.frequency_penalty,
        presence_penalty: float = SamplingConfig.presence_penalty,
        *,
        seed: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
        **others: Any,
    ) -> TokenGenerator:
        """Token ids after a prompt, until the caller stops or the context is full.

        Parameters
        ----------
        tokens
            The prompt, as ids or text.
        reset
            True: the cache becomes this prompt, keeping what it shares with the last one.
            False: the prompt is appended to the cache. A single token that was yielded, or none,
            is no other prompt: the answer goes on (`CoreConfig.start` counts from its beginning).
        temp, top_k, top_p, min_p, typical_p, penalties, logit_bias
            See `coreinfer.config.SamplingConfig`.
        seed
            Of this generation alone; None takes the next of the sequence that `set_seed` began.
        logits_processor, stopping_criteria
            One or several callables of (ids so far, logits) → logits, or → whether to stop.

        Yields
        ------
        int
            End tokens included. `send(ids)` puts ids after the token that was yielded.
        """
        foreign.check_foreign("generate", others, foreign.SAMPLING, _names(Llama.generate))
        sampling = self._sampling(
            temperature=temp,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            repeat_penalty=repeat_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            logit_bias=logit_bias,
        )
        fresh = reset or self.n_tokens == 0
        text = _written(tokens)
        if fresh:
            ids = self.prompt_ids(tokens)
        else:
            if isinstance(tokens, (str, bytes)):
                tokens = self._tokenizer.tokenize(_utf8(tokens), add_bos=False, special=True)
            ids = self.checked_ids(tokens)
        return self.generate_ids(
            ids,
            sampling,
            reset=fresh,
            text=text,
            seed=seed,
            processors=_callables("logits_processor", logits_processor),
            criteria=_callables("stopping_criteria", stopping_criteria),
        )

    # --- text ---

    def create_completion(
        self,
        prompt: str | Tokens,
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = SamplingConfig.temperature,
        top_p: float = SamplingConfig.top_p,
        min_p: float = SamplingConfig.min_p,
        typical_p: float = SamplingConfig.typical_p,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | Sequence[str] | None = None,
        frequency_penalty: float = SamplingConfig.frequency_penalty,
        presence_penalty: float = SamplingConfig.presence_penalty,
        repeat_penalty: float = SamplingConfig.repeat_penalty,
        top_k: int = SamplingConfig.top_k,
        stream: bool = False,
        seed: int | None = None,
        *,
        logit_bias: Mapping[int, float] | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
        **others: Any,
    ) -> CreateCompletionResponse | Iterator[CreateCompletionStreamResponse]:
        """Continue a prompt.

        Parameters
        ----------
        max_tokens
            Tokens to generate at most; None or 0: as many as the context holds.
        logprobs
            Report ln p of every token and of this many of the likeliest ones, from the logits as
            the model gave them. With `echo`, the prompt's tokens too, read dense.
        echo
            Return the prompt before the completion.
        stop
            The text ends before the first of these strings.
        stream
            Return an iterator of chunks; the last carries the finish reason.

        Raises
        ------
        ValueError
            The prompt has no token, does not fit the context, or an argument is out of range.
        """
        foreign.check_foreign(
            "create_completion",
            {"suffix": suffix, **others},
            foreign.COMPLETION,
            _names(Llama.create_completion),
        )
        sampling = self._sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            repeat_penalty=repeat_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            logit_bias=logit_bias,
        )
        ids = self.prompt_ids(prompt)
        answer = self.text_stream(
            ids,
            sampling,
            max_tokens=max_tokens,
            stop=stop,
            n_logprobs=logprobs,
            seed=seed,
            processors=_callables("logits_processor", logits_processor),
            criteria=_callables("stopping_criteria", stopping_criteria),
            text=_written(prompt),
        )
        written = isinstance(prompt, str)
        text = prompt if written else self._text(ids)
        request = Request(self, ids, text, answer, echo, logprobs, written)
        return completion.stream_completion(request) if stream else completion.complete(request)

    __call__ = create_completion

    def create_chat_completion(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        *,
        temperature: float = CHAT_TEMPERATURE,
        top_p: float = SamplingConfig.top_p,
        top_k: int = SamplingConfig.top_k,
        min_p: float = SamplingConfig.min_p,
        typical_p: float = SamplingConfig.typical_p,
        stream: bool = False,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = SamplingConfig.presence_penalty,
        frequency_penalty: float = SamplingConfig.frequency_penalty,
        repeat_penalty: float = SamplingConfig.repeat_penalty,
        logit_bias: Mapping[int, float] | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        **others: Any,
    ) -> CreateChatCompletionResponse | Iterator[CreateChatCompletionStreamResponse]:
        """Answer a conversation, through the chat template that the model file carries.

        Parameters are those of `create_completion`, but `max_tokens=None` is the rest of the
        context, and `logprobs=True` with `top_logprobs=n` reports log-probabilities as OpenAI does.

        Raises
        ------
        ValueError
            The model has no chat template, a message is not text, or an argument is out of range.
        """
        foreign.check_foreign(
            "create_chat_completion", others, foreign.CHAT, _names(Llama.create_chat_completion)
        )
        if top_logprobs is not None and not logprobs:
            raise ValueError(f"top_logprobs is {top_logprobs}; it needs logprobs=True")
        sampling = self._sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            repeat_penalty=repeat_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            logit_bias=logit_bias,
        )
        ids = self.chat_prompt_ids(messages)
        n_logprobs = (top_logprobs or 0) if logprobs else None
        answer = self.text_stream(
            ids,
            sampling,
            max_tokens=max_tokens,
            stop=stop,
            n_logprobs=n_logprobs,
            seed=seed,
            processors=_callables("logits_processor", logits_processor),
            text=completion.last_question(messages),
        )
        request = Request(self, ids, "", answer, False, n_logprobs)
        return completion.stream_chat(request) if stream else completion.chat(request)

    def _template(self) -> ChatTemplate | None:
        if self._chat_template is None:
            try:
                self._chat_template = ChatTemplate.from_metadata(self.metadata, self._tokenizer)
            except ChatTemplateError as error:
                raise ChatTemplateError(f"{self.model_path}: {error}") from error
        return self._chat_template

    @property
    def has_chat_template(self) -> bool:
        """Whether the model file carries a chat template."""
        return self._template() is not None

    def chat_prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Ids of a conversation up to where the assistant's answer begins, int32 (n,)."""
        plain = completion.plain_messages(messages)
        template = self._template()
        if template is None:
            raise ValueError(
                f"{self.model_path}: the file has no chat template; use create_completion with a "
                "prompt in the form that the model was trained on"
            )
        text = template.render(plain, add_generation_prompt=True)
        ids = self.prompt_ids(text, add_bos=False)
        # Some templates write the BOS themselves; it must not be there twice.
        return ids if int(ids[0]) == self.token_bos() else self.prompt_ids(text)

    def _text(self, ids: np.ndarray) -> str:
        return self.detokenize(ids).decode("utf-8", errors="replace")

    def text_stream(
        self,
        ids: np.ndarray,
        sampling: SamplingConfig,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        n_logprobs: int | None = None,
        **generation: Any,
    ) -> TextStream:
        """What follows checked prompt `ids`, as an iterable of text; it starts when iterated.

        `generation` is passed on to `generate_ids`.
        """
        room = self.n_ctx() - ids.size
        if room < 1:
            raise ValueError(
                f"Requested tokens ({ids.size + 1}) exceed context window of {self.n_ctx()}; "
                "shorten the prompt, or load the model with a larger n_ctx"
            )
        if max_tokens is None or _whole("max_tokens", max_tokens) <= 0:
            max_tokens = room
        if n_logprobs is not None and not 0 <= _whole("logprobs", n_logprobs) <= self.n_vocab():
            raise ValueError(f"logprobs is {n_logprobs}; expected 0 to {self.n_vocab()}")
        return TextStream(
            source=self.generate_ids(ids, sampling, n_answer=min(max_tokens, room), **generation),
            decoder=self._tokenizer.stream_decoder(),
            end_ids=frozenset(self._tokenizer.end_ids),
            watcher=StopWatcher(_stops(stop)),
            max_tokens=min(max_tokens, room),
            logprobs=None if n_logprobs is None else partial(self.token_logprobs, n_logprobs),
        )


def _existing(model_path: str | os.PathLike[str]) -> str:
    path = os.fsdecode(model_path)
    if os.path.exists(path):
        return path
    hint = ""
    if path.lower() in models.KNOWN_MODELS:
        hint = f"; it is the name of a known model: use coreinfer.resolve_model({path!r})"
    raise ModelPathError(f"Model path does not exist: {path}{hint}")


def _names(function: Callable[..., Any]) -> list[str]:
    return [
        name for name in inspect.signature(function).parameters if name not in ("self", "others")
    ]


def _utf8(text: str | bytes) -> bytes:
    try:
        return text.encode("utf-8") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is no Unicode: its character {error.start} is half of a surrogate pair, "
            f"{text[error.start]!a}; expected whole characters"
        ) from None


def _written(prompt: str | bytes | Tokens) -> str | None:
    """A prompt's text, if it is one: what its cluster is chosen by."""
    if isinstance(prompt, bytes):
        return prompt.decode("utf-8", errors="replace")
    return prompt if isinstance(prompt, str) else None


def _callables(name: str, one_or_many: Any) -> list[Any]:
    if one_or_many is None:
        return []
    found = list(one_or_many) if isinstance(one_or_many, Sequence) else [one_or_many]
    if not all(map(callable, found)):
        raise TypeError(f"{name} is {one_or_many!r}; expected a callable, or a list of them")
    return found


def _stops(stop: str | Sequence[str] | None) -> list[str]:
    if stop is None or isinstance(stop, str):
        return [] if stop is None else [stop]
    if isinstance(stop, (bytes, bytearray)) or not isinstance(stop, Iterable):
        raise TypeError(f"stop is {stop!r}; expected a string, or a list of strings")
    return list(stop)


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected an integer or None") from None
