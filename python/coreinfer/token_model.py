"""TokenModel: token ids in, token ids and log-probabilities out; `Llama` adds text.

Owns the engine and one session. A generation reads its prompt dense, chooses core neurons as
`core` says, compacts them if they changed, and decodes; the arithmetic is the C++ session's.
"""

from __future__ import annotations

import contextlib
import os
import random
import reprlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from . import _core
from .auto import Decision
from .clusters import Clusters
from .config import RANDOM_SEED, CoreConfig, LoadConfig, SamplingConfig
from .core_choice import AnyClusters, CoreChoice, ModelFacts
from .core_sets import CoreSet
from .embedders import AnyEmbedder
from .loading import load_engine
from .text_stream import TopLogprobs
from .timings import Timings, since
from .tuning import Tuning, tuning_of
from .types import Backend, LlamaState

LogitsProcessor = Callable[[np.ndarray, np.ndarray], np.ndarray]
StoppingCriterion = Callable[[np.ndarray, np.ndarray], bool]
Tokens = Sequence[int] | np.ndarray
TokenGenerator = Generator[int, Sequence[int] | None, bool]

_TOKEN_IDS = "a sequence of token ids"  # in messages
_SCORE_CHUNK = 64  # rows of (n_vocab) log-probabilities held at once for an echoed prompt


class TokenModel:
    """A loaded model, the text in its cache, and the neurons that decode it.

    One object serves one caller at a time: a second thread gets a RuntimeError. What needs the
    model's weights or cache raises RuntimeError once the object is closed.
    """

    def __init__(
        self,
        model_path: str,
        file: _core.GgufFile,
        config: LoadConfig,
        core: CoreConfig | CoreSet,
        prefill_progress: Callable[[int, int], None] | None,
        clusters: AnyClusters | None = None,
        embedder: AnyEmbedder | None = None,
        text_of: Callable[[Tokens], str] | None = None,
        tuning: str | os.PathLike[str] | Tuning | None = None,
    ) -> None:
        self.model_path = model_path
        self.prefill_progress = prefill_progress
        self._config = config
        self._tuning = tuning
        fingerprint = _core.fingerprint(file, config.activation or "")
        find_tuning = partial(tuning_of, tuning, model_path, fingerprint)
        if clusters is not None and not isinstance(clusters, Clusters):
            clusters = Clusters.load(clusters)  # before the weights, which are planned by it
        self._engine: _core.Engine | None = load_engine(file, config, core, find_tuning, clusters)
        self._session: _core.Session | None = _core.Session(
            self._engine,
            n_ctx=config.n_ctx,
            n_batch=config.n_batch,
            type_k=config.type_k,
            type_v=config.type_v,
        )
        self._lock = threading.Lock()
        self._generation = 0  # grows whenever the cache gets another text
        self._timings_before: dict[str, float] = {}
        self._reused = 0
        self._choice = CoreChoice(ModelFacts.of(self._engine), find_tuning, text_of)
        try:
            self.set_clusters(clusters, embedder)
            self.core = core
            self.set_seed(config.seed)
        except BaseException:
            self.close()  # whoever keeps the exception keeps this object, but not the weights
            raise

    # --- what is open, and closing ---

    def _open_engine(self) -> _core.Engine:
        if self._engine is None:
            raise RuntimeError("this Llama is closed")
        return self._engine

    def _open_session(self) -> _core.Session:
        if self._session is None:
            raise RuntimeError("this Llama is closed")
        return self._session

    @contextlib.contextmanager
    def _computing(self) -> Iterator[_core.Session]:
        """The session, for one computation; a second thread is told so instead of waiting."""
        session = self._open_session()
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "this Llama is computing, in another thread or in what called this function; "
                "use one Llama a thread"
            )
        try:
            yield session
        finally:
            self._lock.release()

    def __repr__(self) -> str:
        core = self.core.mode if isinstance(self.core, CoreConfig) else self.core
        session = self._session
        state = "closed" if session is None else f"{session.n_past} of {session.n_ctx} tokens"
        return f"<{type(self).__name__}: {self.model_path}, core {core}, {state}>"

    def close(self) -> None:
        """Give the model's memory back; the object then only says that it is closed."""
        self._session = None
        self._engine = None

    # --- facts ---

    def n_ctx(self) -> int:
        """Tokens that fit the context."""
        return self._open_session().n_ctx

    def n_embd(self) -> int:
        """Width of the hidden state."""
        return self._open_engine().config["n_embd"]

    def n_layer(self) -> int:
        """Layers of the model."""
        return self._open_engine().n_layer

    def n_ff(self) -> int:
        """Neurons of a layer."""
        return self._open_engine().config["n_ff"]

    def n_vocab(self) -> int:
        """Number of token ids."""
        return self._open_engine().n_vocab

    @property
    def n_tokens(self) -> int:
        """Tokens in the cache."""
        return self._open_session().n_past

    @property
    def input_ids(self) -> np.ndarray:
        """The cache's tokens, int32 (n_tokens,)."""
        return np.asarray(self._open_session().tokens, dtype=np.int32)

    @property
    def eval_tokens(self) -> list[int]:
        """The cache's tokens as a list."""
        return list(self._open_session().tokens)

    @property
    def eval_logits(self) -> np.ndarray:
        """Logits of the last position, float32 (1, n_vocab)."""
        return self._open_session().logits()[None, :]

    @property
    def backend(self) -> Backend:
        """What computes: name, instruction set, threads."""
        info = self._open_engine().backend
        return Backend(info["name"], info["isa"], info["n_threads"], info["description"])

    @property
    def fingerprint(self) -> int:
        """Fingerprint of the model file and a replaced activation, as core sets carry it."""
        return self._open_engine().fingerprint

    @property
    def timings(self) -> Timings:
        """Tokens, seconds and bytes of the last generation or score."""
        session, engine = self._open_session(), self._open_engine()
        now, memory = session.timings, _core.memory()
        return Timings(
            load_seconds=now["load_seconds"],
            **since(now, self._timings_before),
            compact_bytes=now["compact_bytes"],
            **self._choice.lookup_seconds,
            patch_bytes=session.patch_bytes,
            reused_tokens=self._reused,
            dense_weight_bytes=engine.weight_bytes,
            decode_weight_bytes=session.decode_weight_bytes,
            kv_bytes=session.kv_bytes,
            resident_bytes=memory["rss"],
            peak_resident_bytes=memory["peak_rss"],
        )

    # --- core neurons ---

    @property
    def core(self) -> CoreConfig | CoreSet:
        """How generations choose their neurons; may be set between them as in the constructor."""
        return self._choice.core

    @core.setter
    def core(self, core: str | CoreConfig | CoreSet) -> None:
        self._open_engine()
        self._choice.set_core(core)

    @property
    def decision(self) -> Decision | None:
        """What `core="auto"` decided for the present text, and why; None for other settings."""
        return self._choice.decision

    def set_core_set(self, core_set: CoreSet | None) -> None:
        """Decode with these neurons from the next generation on; None decodes dense."""
        if core_set is not None and not isinstance(core_set, CoreSet):
            raise TypeError(
                f"core_set is {core_set!r}; expected a CoreSet (CoreSet.load reads one from a "
                "file) or None"
            )
        self.core = "off" if core_set is None else core_set

    @property
    def core_set(self) -> CoreSet | None:
        """The neurons that decode the present text; None if it is decoded dense."""
        self._open_session()
        return self._choice.core_set

    @property
    def stability(self) -> float | None:
        """How surely the prompt chooses its neurons: whether its first half chose the same ones.

        1: all of them; 0: as many as by chance. None where nothing was counted (`core="off"`) and
        for a prompt of one token.
        """
        return self._choice.stability

    @property
    def drafting(self) -> dict[str, dict[str, Any]] | None:
        """What drafts are worth in exact mode, by their source ("core", "text"); None otherwise.

        For each the `gain`, expected tokens a second over dense decoding's, 1 where dense decoding
        is the faster and nothing is drafted; the `acceptance`, the share of drafts that come true;
        and whether enough were judged for these to be `known`.
        """
        return self._open_session().pace

    @property
    def clusters(self) -> Clusters | None:
        """The clusters that "similar" and "auto" may choose by, and patches learn from."""
        return self._choice.clusters

    def set_clusters(
        self, clusters: AnyClusters | None, embedder: AnyEmbedder | None = None
    ) -> None:
        """Take clusters, or the file of some, from the next text on; None forgets them.

        `embedder` stands in for the one that the clusters name. What does not fit this model is a
        ValueError, and the clusters that were there stay.
        """
        self._open_engine()
        self._choice.set_clusters(clusters, embedder)

    # --- ids ---

    def checked_ids(
        self, tokens: Tokens, name: str = "tokens", expected: str = _TOKEN_IDS
    ) -> np.ndarray:
        """`tokens` as int32 (n,); ValueError for anything that is not ids of the vocabulary."""
        n_vocab = self.n_vocab()
        try:
            ids = np.asarray(tokens)
        except ValueError:  # lists of different lengths in a list
            ids = np.array(None)
        if ids.size == 0:
            return np.zeros(0, dtype=np.int32)
        whole = ids.dtype.kind in "iu" or all(type(t) is int for t in ids.flat)
        if ids.ndim != 1 or not whole:
            raise ValueError(f"{name} is {_found(tokens)}; expected {expected}")
        wrong = np.flatnonzero((ids < 0) | (ids >= n_vocab))
        if wrong.size:
            at = int(wrong[0])
            raise ValueError(
                f"{name}[{at}] is {int(ids[at])}; expected a token id from 0 to {n_vocab - 1}"
            )
        return np.ascontiguousarray(ids, dtype=np.int32)

    def checked_prompt(self, tokens: Tokens, expected: str = _TOKEN_IDS) -> np.ndarray:
        """`checked_ids`, and ValueError if there is none or more than the context holds."""
        ids = self.checked_ids(tokens, "prompt", expected)
        if ids.size == 0:
            raise ValueError(
                "the prompt is empty: it has no token, and the model adds no BOS; give some text"
            )
        self._check_room(ids.size)
        return ids

    def _check_room(self, n: int) -> None:
        if n > self.n_ctx():
            raise ValueError(
                f"Requested tokens ({n}) exceed context window of {self.n_ctx()}; shorten the "
                "text, or load the model with a larger n_ctx"
            )

    # --- reading and drawing, one step at a time ---

    def reset(self) -> None:
        """Forget the text in the cache."""
        with self._computing() as session:
            self._generation += 1
            session.reset()
            self._choice.forget()

    def set_seed(self, seed: int) -> None:
        """Start the sequence of sampler seeds again; 0xFFFFFFFF or -1 takes one from the system."""
        self._seed = LoadConfig(seed=seed).seed
        self._random = random.Random(None if self._seed == RANDOM_SEED else self._seed)

    def eval(self, tokens: Tokens) -> None:
        """Append tokens to the cache with the dense weights; `sample` draws what follows.

        What was decoded with core neurons before is read again, dense.
        """
        ids = self.checked_ids(tokens)
        if ids.size:
            with self._computing() as session:
                self._read(session, self._after_cache(session, ids))

    def draw(self, sampling: SamplingConfig, processors: Sequence[LogitsProcessor] = ()) -> int:
        """Draw the token after the cache; the cache stays as it is."""
        if self.n_tokens == 0:
            raise RuntimeError("there is nothing to sample from; call eval first")
        with self._computing() as session:
            return _draw(session, self._sampler(session, sampling, None), processors)

    def token_logprobs(self, n_top: int, token: int) -> tuple[float, TopLogprobs]:
        """ln p of `token` after the cache, and the `n_top` likeliest ids with theirs."""
        with self._computing() as session:
            return session.logprobs(n_top, token)

    def _after_cache(self, session: _core.Session, ids: np.ndarray) -> np.ndarray:
        whole = np.concatenate([np.asarray(session.tokens, dtype=np.int32), ids])
        self._check_room(whole.size)
        return whole

    def _read(
        self,
        session: _core.Session,
        ids: np.ndarray,
        counted: dict[str, Any] | None = None,
        **answer: Any,
    ) -> None:
        """Make the cache hold exactly `ids`, dense, reusing what it can of the last text.

        `counted` is what to count; by default what `core` asks for, with an `answer` as
        `CoreChoice.begin` takes it.
        """
        self._generation += 1
        self._timings_before = dict(session.timings)
        self._choice.begin(**answer)
        expected = {}
        if counted is None:
            counted, expected = self._choice.counted(), self._choice.expected()
        self._reused = session.reusable(ids, **counted)
        session.keep(self._reused)
        session.prefill(
            ids[self._reused :],
            **counted,
            progress=self.prefill_progress,
            **expected,
        )

    def _sampler(
        self, session: _core.Session, sampling: SamplingConfig, seed: int | None
    ) -> _core.Sampler:
        if seed is None:
            seed = self._random.getrandbits(32)
        elif LoadConfig(seed=seed).seed == RANDOM_SEED:
            seed = random.SystemRandom().getrandbits(32)
        n_vocab = self.n_vocab()
        for token in sampling.logit_bias or ():
            if not 0 <= token < n_vocab:
                raise ValueError(f"logit_bias names token {token}; expected 0 to {n_vocab - 1}")
        sampler = _core.Sampler(seed=seed, **sampling.sampler_arguments())
        if sampling.has_penalties:
            for token in session.tokens[-sampling.penalty_last_n :]:
                sampler.accept(token)
        return sampler

    # --- generation ---

    def generate_ids(
        self,
        ids: np.ndarray,
        sampling: SamplingConfig,
        *,
        reset: bool = True,
        text: str | None = None,
        seed: int | None = None,
        n_answer: int | None = None,
        processors: Sequence[LogitsProcessor] = (),
        criteria: Sequence[StoppingCriterion] = (),
    ) -> TokenGenerator:
        """Token ids after checked `ids`, until the caller stops or the context is full.

        The first token is drawn from the prefill's own, dense, logits. `send(ids)` puts ids after
        the token that was yielded, through the decode weights. Returns whether a criterion ended
        it, which is not so when the context is full. `text` is what the prompt says, for choosing
        its cluster; None takes the text of the ids. `n_answer` is how many tokens the caller takes
        at most, if that is known: how `core="auto"` weighs what a choice of neurons costs.
        """
        with self._computing() as session:
            # A token that was yielded, or none, is not a prompt: the present answer goes on.
            goes_on = not reset and ids.size <= 1
            whole = ids if reset else self._after_cache(session, ids)
            answer = {"n_answer": n_answer, "temperature": sampling.temperature}
            self._read(session, whole, goes_on=goes_on, **answer)
            self._choice.choose(session, text if reset else None)
            generation = self._generation
            sampler = self._sampler(session, sampling, seed)
        while True:
            with self._computing() as session:
                token = _draw(session, sampler, processors)
                if criteria:
                    so_far = np.asarray(session.tokens, dtype=np.int32)
                    logits = session.logits()
                    if any(stop(so_far, logits) for stop in criteria):
                        return True
            sent = yield token
            with self._computing() as session:
                if self._generation != generation:
                    raise RuntimeError(
                        "the cache now holds another text; finish one generation before the next, "
                        "or use two Llama objects"
                    )
                if session.n_past >= session.n_ctx:
                    return False
                extra = self.checked_ids([] if sent is None else sent)
                self._check_room(session.n_past + 1 + extra.size)
                session.decode(token, sampler)
                for token in extra.tolist():
                    session.decode(token, sampler)
                    sampler.accept(token)
                self._choice.grown(session)

    def neuron_scores(
        self,
        prompt_ids: Tokens,
        *,
        statistic: str = CoreConfig.statistic,
        alpha: float = CoreConfig.alpha,
        weighted: bool = CoreConfig.weighted,
        samples: int = 0,
    ) -> np.ndarray:
        """How strongly a prompt activates each neuron: the statistic per token, read dense.

        `samples` tokens, the last ones, are kept for `ffn_samples`.

        Returns
        -------
        ndarray float32 (n_layer, n_ff)
            Mean over the prompt's tokens, whatever `core` is.
        """
        prompt = self.checked_prompt(prompt_ids)
        core = CoreConfig(statistic=statistic, alpha=alpha, weighted=weighted)
        counted = {name: getattr(core, name) for name in ("statistic", "alpha", "weighted")}
        with self._computing() as session:
            self._read(session, prompt, {**counted, "samples": samples})
            raw = session.select(beta=1.0)
            return np.stack(raw.scores) / np.float32(raw.n_tokens)

    def ffn_samples(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """What went into and came out of a layer's down projection, for tokens just read.

        Returns
        -------
        h, y : ndarray float32 (n, n_ff), (n, n_embd)
            `y` without the bias. RuntimeError unless `neuron_scores` was asked for samples.
        """
        h, y = self._open_session().samples(layer)
        bias = self._open_engine().ffn_down_bias(layer)
        return h, y if bias is None else y - bias

    def score(
        self,
        prompt_ids: Tokens,
        continuation_ids: Tokens,
        *,
        text: str | None = None,
        temperature: float = SamplingConfig.temperature,
    ) -> np.ndarray:
        """Log-probabilities of a continuation, computed as a generation would compute them.

        The prompt is read dense and chooses the core set; the continuation runs through the decode
        weights, so this measures what decoding with core neurons does. With `start` its first
        tokens run through the dense weights, as an answer's do. `text` is that of `generate_ids`;
        `temperature`, what an answer would be drawn at, changes what `core="auto"` may take.

        Returns
        -------
        ndarray float32 (n, n_vocab)
            Row k is ln p(· | prompt, continuation[:k]); row 0 is the prefill's own.
        """
        prompt = self.checked_prompt(prompt_ids)
        continuation = self.checked_ids(continuation_ids, "continuation_ids")
        self._check_room(prompt.size + max(0, continuation.size - 1))
        with self._computing() as session:
            self._read(session, prompt, temperature=temperature)
            self._choice.choose(session, text)
            if continuation.size == 0:
                return np.zeros((0, self.n_vocab()), dtype=np.float32)
            begin = continuation[: self._choice.n_dense]
            if begin.size in (0, continuation.size):
                return session.score(continuation)
            rows = session.score(begin)
            session.decode(int(begin[-1]))
            self._choice.grown(session)
            return np.concatenate([rows, session.score(continuation[begin.size :])])

    def prompt_logprobs(self, ids: Tokens, n_top: int) -> list[tuple[float, TopLogprobs]]:
        """ln p of every id but the first, and the `n_top` likeliest in its place, read dense.

        Row i belongs to ids[i + 1]. Decoding is dense afterwards, until the next generation.
        """
        prompt = self.checked_prompt(ids)
        rows: list[tuple[float, TopLogprobs]] = []
        with self._computing() as session:
            self._generation += 1
            self._choice.restore(session, None)
            session.keep(0)
            session.prefill(prompt[:1])
            done = 1
            while done < prompt.size:
                # A call leaves its last id out of the cache, so the next begins with that one.
                chunk = prompt[done : done + _SCORE_CHUNK]
                scores = session.score(np.ascontiguousarray(prompt[done : done + len(chunk) + 1]))
                for row, token in zip(scores, chunk.tolist(), strict=False):
                    rows.append((float(row[token]), _likeliest(row, n_top)))
                done += len(chunk)
        return rows

    # --- state ---

    def save_state(self) -> LlamaState:
        """The cache, its statistics and the core set, for `load_state`.

        `generate([token], reset=False)` goes on from there, with the last token that was yielded:
        a dense beginning where it was. The core set is chosen anew, by the text so far.
        """
        with self._computing() as session:
            blob = session.save_state()
            n_prompt, prompt_text = self._choice.prompt
            return LlamaState(
                input_ids=np.asarray(session.tokens, dtype=np.int32),
                n_tokens=session.n_past,
                llama_state=blob,
                llama_state_size=len(blob),
                seed=self._seed,
                core_set=self._choice.core_set,
                n_prompt=n_prompt,
                prompt_text=prompt_text,
            )

    def load_state(self, state: LlamaState) -> None:
        """Go back to a saved state of the same model with the same context and cache types."""
        if not isinstance(state, LlamaState):
            raise TypeError(
                f"state is {type(state).__name__}; expected the LlamaState that save_state gave"
            )
        if state.n_prompt is not None and not 0 < state.n_prompt <= state.n_tokens:
            raise ValueError(
                f"the saved state is damaged: its prompt has {state.n_prompt} of "
                f"{state.n_tokens} tokens"
            )
        with self._computing() as session:
            session.load_state(state.llama_state)  # refuses without losing what is there
            self._generation += 1
            self._choice.restore(session, state.core_set, (state.n_prompt, state.prompt_text))
        self.set_seed(state.seed)


def _found(tokens: Any) -> str:
    """What is given instead of token ids, in words."""
    kind = type(tokens).__name__
    if isinstance(tokens, np.ndarray):
        return f"an array of {tokens.dtype} with {tokens.ndim} dimensions"
    if isinstance(tokens, Sequence) and not isinstance(tokens, (str, bytes)):
        for i, token in enumerate(tokens):
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
                return f"a {kind} with {reprlib.repr(token)} at position {i}"
    return f"{reprlib.repr(tokens)} ({kind})"


def _draw(
    session: _core.Session, sampler: _core.Sampler, processors: Sequence[LogitsProcessor]
) -> int:
    if not processors:
        return session.sample(sampler)
    ids, logits = np.asarray(session.tokens, dtype=np.int32), session.logits()
    expected = logits.shape
    for processor in processors:
        given = processor(ids, logits)
        if np.shape(given) != expected:
            found = "None" if given is None else f"shape {np.shape(given)}"
            raise ValueError(f"a logits processor returned {found}; expected shape {expected}")
        logits = np.ascontiguousarray(given, dtype=np.float32)
    token = sampler.sample(logits)
    sampler.accept(token)
    return token


def _likeliest(row: np.ndarray, n: int) -> TopLogprobs:
    """The n largest entries with their indices, largest first, ties to the lower index."""
    if n == 0:
        return []
    least = np.partition(row, row.size - n)[row.size - n]
    candidates = np.flatnonzero(row >= least)
    order = candidates[np.lexsort((candidates, -row[candidates]))][:n]
    return [(int(i), float(row[i])) for i in order]
