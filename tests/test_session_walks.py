"""Random walks over a session's calls: whatever came before, a session stays what its tokens say.

Each walk drives two sessions, of one and of two threads, through the same calls and compares them
after every one, bit for bit; how many positions are dense it counts itself. On the way it checks
that exact mode gives dense decoding's bits, that a saved state is all there is to a session, that a
fresh session agrees, and that a refused call leaves no trace.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from coreinfer import _core
from make_synthetic_model import make_tiny_model

N_CTX = 90
SHAPES = {
    "llama": {"n_embd": 50, "n_head": 5, "n_head_kv": 1, "head_dim": 10, "n_ff": 77},
    "qwen2": {"n_embd": 64, "n_head": 4, "n_head_kv": 2, "n_ff": 96},
    "qwen3": {"n_embd": 64, "n_head": 2, "n_head_kv": 1, "head_dim": 40, "n_ff": 96},
    "gemma2": {"n_embd": 48, "n_head": 2, "n_head_kv": 1, "head_dim": 24, "sliding_window": 13},
    "gemma3": {"n_embd": 48, "n_head": 2, "n_head_kv": 1, "head_dim": 24, "sliding_window": 17},
    "phi3": {
        "n_embd": 64,
        "n_head": 4,
        "n_head_kv": 2,
        "head_dim": 16,
        "n_ff": 72,
        "sliding_window": 19,
        "rope_dim": 12,
        "rope_scaling": None,
    },
    "granite": {"n_embd": 48, "n_head": 3, "n_head_kv": 3, "head_dim": 16, "n_ff": 80},
    "smollm3": {"n_embd": 48, "n_head": 3, "n_head_kv": 1, "head_dim": 16, "n_ff": 80},
    "olmo2": {"n_embd": 48, "n_head": 3, "n_head_kv": 1, "head_dim": 16, "n_ff": 80},
    "opt": {"n_embd": 64, "n_head": 4, "n_head_kv": 4, "head_dim": 16, "n_ff": 96},
}
REFUSED = (ValueError, RuntimeError, ArithmeticError)


def can_continue_dense(session: _core.Session) -> bool:
    """Whether all of the text is dense, and its last logits are there (`keep` forgets them)."""
    if session.n_past == 0 or session.n_dense < session.n_past:
        return False
    try:
        session.logits()
    except RuntimeError:
        return False
    return True


class Walk:
    """Two sessions that must not be told apart, and the choice of what to do next."""

    def __init__(self, path: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.engines = [_core.Engine(path, n_threads=n, f32_activations=True) for n in (1, 2)]
        self.n_vocab = self.engines[0].n_vocab
        self.options = {
            "n_ctx": N_CTX,
            "n_batch": self.random.choice([5, 16, 512]),
            "type_k": self.random.choice(["f32", "f16"]),
            "type_v": "f32",
        }
        self.sessions = [_core.Session(engine, **self.options) for engine in self.engines]
        self.counted = {
            "statistic": self.random.choice(["count", "count_gate", "count_abs", "flock"]),
            "samples": self.random.choice([0, 16]),
        }
        self.n_dense = 0

    def tokens(self, most: int) -> np.ndarray:
        n = self.random.randint(1, most)
        # Few different ones now and then, so that exact mode finds repetitions to draft from.
        few = self.random.choice([3, self.n_vocab])
        return np.array([self.random.randrange(few) for _ in range(n)], np.int32)

    def both(self, call):
        """What both sessions answer; the words of the error where both refuse."""
        answers = []
        for session in self.sessions:
            try:
                answers.append(call(session))
            except REFUSED as error:
                answers.append(f"{type(error).__name__}: {error}")
        first, second = answers
        if isinstance(first, np.ndarray):
            np.testing.assert_array_equal(first, second)
        elif isinstance(first, _core.CoreSet):
            assert first.same_neurons(second)
        else:
            assert first == second
        return first

    def step(self) -> None:
        getattr(self, self.random.choice([n for n in dir(type(self)) if n.startswith("do_")]))()
        n_dense = self.both(lambda s: (s.tokens, s.n_dense))[1]
        assert n_dense == self.n_dense
        self.both(lambda s: s.logits())

    def appended(self, n_before: int, dense: bool) -> None:
        """Dense positions are those up to the first that core neurons wrote."""
        if dense and self.n_dense == n_before:
            self.n_dense = self.sessions[0].n_past

    # --- calls ---

    def do_prefill(self):
        tokens, counted = self.tokens(40), self.random.choice([{}, self.counted])
        n_past = self.sessions[0].n_past
        self.both(lambda s: s.prefill(tokens, **counted))
        self.appended(n_past, dense=True)

    def do_another_text(self):
        kept = self.random.randint(0, len(self.sessions[0].tokens))
        start = np.array(self.sessions[0].tokens[:kept], np.int32)
        tokens = np.concatenate([start, self.tokens(20)])[:N_CTX]
        known = self.both(lambda s: s.reusable(tokens, **self.counted))
        self.both(lambda s: s.keep(known))
        self.both(lambda s: s.prefill(tokens[known:], **self.counted))
        assert self.sessions[0].tokens == tokens.tolist()
        self.n_dense = len(tokens)

    def do_decode(self):
        n_past = self.sessions[0].n_past
        for token in self.tokens(8).tolist():
            self.both(lambda s, token=token: s.decode(token))
        self.appended(n_past, dense=self.sessions[0].core_set is None)

    def do_verify(self):
        tokens = self.tokens(20)
        n_past = self.sessions[0].n_past
        self.both(lambda s: s.verify(tokens))
        self.appended(n_past, dense=self.sessions[0].core_set is None)

    def do_core(self):
        chosen = self.both(lambda s: s.select(beta=0.4))
        if isinstance(chosen, _core.CoreSet):
            self.both(lambda s: s.set_core(chosen))
            self.both(lambda s: s.fit_patch(rank=4))

    def do_dense(self):
        self.both(lambda s: s.set_core(None))

    def do_replay(self):
        self.both(lambda s: s.replay(**self.counted))
        self.n_dense = self.sessions[0].n_past

    def do_keep(self):
        n = self.random.randint(0, self.sessions[0].n_past)
        self.both(lambda s: s.keep(n))
        self.n_dense = min(self.n_dense, n)

    def do_reload(self):
        states = [session.save_state() for session in self.sessions]
        self.sessions = [_core.Session(engine, **self.options) for engine in self.engines]
        for session, state in zip(self.sessions, states, strict=True):
            session.load_state(state)
            assert session.save_state() == state

    def do_refused(self):
        before = [session.save_state() for session in self.sessions]
        wrong = self.random.choice(
            [
                lambda s: s.prefill(np.full(N_CTX + 1, 1, np.int32)),
                lambda s: s.prefill(np.array([1, self.n_vocab], np.int32), **self.counted),
                lambda s: s.decode(-1),
                lambda s: s.verify(np.array([2, self.n_vocab], np.int32)),
                lambda s: s.keep(-1),
                lambda s: s.select(beta=0.0),
                lambda s: s.load_state(before[0][:-1]),
                lambda s: s.set_core(_core.CoreSet([None], n_ff=1)),
            ]
        )
        assert isinstance(self.both(wrong), str)
        assert [session.save_state() for session in self.sessions] == before

    def do_fresh(self):
        """A prefill of the same tokens in one go ends where a dense text stands."""
        session = self.sessions[0]
        if not can_continue_dense(session):
            return
        fresh = _core.Session(self.engines[0], **self.options)
        fresh.prefill(np.array(session.tokens, np.int32))
        logits = fresh.logits()
        # Keys in float16 are rounded after sums of another order: half a unit of 2**-10, now and
        # then, of a few values; a wrong position or a stale entry moves logits by their spread.
        np.testing.assert_allclose(session.logits(), logits, atol=0.05 * logits.std())

    def do_exact(self):
        """Drafts and all, exact mode draws what dense decoding draws."""
        start = self.sessions[0].save_state()
        dense, drafting = (_core.Session(engine, **self.options) for engine in self.engines)
        for session in (dense, drafting):
            session.load_state(start)
        if not can_continue_dense(dense):
            return
        dense.set_core(None)
        drafting.set_exact(beta=0.4, max_drafts=self.random.choice([1, 4, 8]), paced=False)
        heat = {"temperature": self.random.choice([0.0, 0.9]), "seed": 7}
        samplers = [_core.Sampler(**heat) for _ in "ab"]
        while dense.n_past + 4 < N_CTX:
            token = dense.sample(samplers[0])
            assert drafting.sample(samplers[1]) == token
            dense.decode(token)
            drafting.decode(token, samplers[1])
            expected = drafting.expected
            if expected is not None and self.random.random() < 0.2:
                # What was looked at in advance is of no use to another text.
                n, again = dense.n_past - 1, [(token + 1) % self.n_vocab, expected]
                for session in (dense, drafting):
                    session.keep(n)
                    for other in again:
                        session.decode(other)
            np.testing.assert_array_equal(dense.logits(), drafting.logits())


@pytest.fixture(scope="module", params=SHAPES)
def path(request, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("walks") / "m.gguf"
    make_tiny_model(
        path, request.param, n_layer=3, n_vocab=272, n_ctx=N_CTX, **SHAPES[request.param]
    )
    return str(path)


@pytest.mark.parametrize("seed", range(8))
def test_a_session_is_what_its_tokens_say(path, seed):
    walk = Walk(path, seed)
    for _ in range(40):
        walk.step()
