"""Saved states and pickles: they go on where they were, or are refused whole."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from coreinfer import CoreConfig
from make_synthetic_model import make_tiny_model
from small_clusters import make_clusters_by_neurons
from tiny_llama import PROMPT, load, take


@pytest.mark.parametrize("core", ["off", "stable"])
def test_a_saved_state_goes_on_where_it_was(tiny, core):
    with load(tiny, core=core) as llm:
        prompt = llm.tokenize(PROMPT)
        expected = take(20, llm.generate(prompt, temp=0))
        tokens = llm.generate(prompt, temp=0)
        take(5, tokens)
        state = pickle.loads(pickle.dumps(llm.save_state()))
        take(3, llm.generate([1, 2, 3]))
        llm.load_state(state)
        assert len(state.llama_state) > 1000 > len(repr(state))
        assert llm.eval_tokens == [*prompt, *expected[:4]]
        got = []
        for _ in range(5):
            got.append(llm.sample(temp=0))
            llm._open_session().decode(got[-1])
        assert got == expected[4:9]
        llm.load_state(state)
        drawn = take(20, llm.generate(prompt, temp=2.0))
        llm.set_seed(1)
        assert take(20, llm.generate(prompt, temp=2.0)) == drawn
        llm.load_state(state)
        if core == "stable":
            assert llm.core_set.same_neurons(state.core_set)
    with load(tiny, core=core) as other:  # another object, which has never seen the prompt
        other.load_state(state)
        next(other.generate(prompt, temp=0))
        # A state has no samples for a patch: a short prompt is read again.
        assert (other.timings.reused_tokens > 0) == (core == "off")
        if core == "stable":
            other.core = CoreConfig(patch=False)
            other.load_state(state)
            assert other.n_tokens == len(prompt) + 4


@pytest.mark.parametrize("mode", ["stable", "similar"])
@pytest.mark.parametrize("between", ["loaded", "stopped"])
def test_a_dense_beginning_goes_on_where_it_was(tiny, mode, between):
    """A prompt's cluster, too, is that of the prompt, not of what was answered."""
    clusters = make_clusters_by_neurons() if mode == "similar" else None
    share = {"similar": "gamma", "stable": "beta"}[mode]
    core = CoreConfig(mode=mode, **{share: 0.2}, start=9, patch=False)
    # Batches of 16: how a text is cut into batches changes no bit.
    options = {"core": core, "clusters": clusters, "n_batch": 16}
    with load(tiny, **options) as llm:
        prompt = llm.tokenize(PROMPT)
        expected, chosen = take(40, llm.generate(prompt, temp=0)), llm.core_set
        got = take(5, llm.generate(prompt, temp=0))
        state = pickle.loads(pickle.dumps(llm.save_state()))
        if between == "loaded":
            take(12, llm.generate([1, 2, 3], temp=0))
            llm.load_state(state)
        got += take(35, llm.generate(got[-1:], reset=False, temp=0))
        assert got == expected and llm.core_set.same_neurons(chosen)
        assert llm.core_set.cluster == chosen.cluster
    with load(tiny, **options) as other:
        other.load_state(state)
        assert take(35, other.generate(expected[4:5], reset=False, temp=0)) == expected[5:]
        # More than one token is another prompt, whose answer begins dense, too.
        more = [*expected[4:9], 7]
        take(9, other.generate(more, reset=False, temp=0))
        assert other.core_set is None


@pytest.mark.parametrize("n_prompt", [0, -1, 10_000])
def test_a_state_whose_prompt_cannot_be_is_refused(tiny, n_prompt):
    with load(tiny, core="stable") as llm:
        next(llm.generate(PROMPT))
        state = dataclasses.replace(llm.save_state(), n_prompt=n_prompt)
        with pytest.raises(ValueError, match=f"damaged: its prompt has {n_prompt} of"):
            llm.load_state(state)


def test_a_text_that_was_forgotten_has_no_neurons(tiny):
    for core in ("stable", "auto"):
        with load(tiny, core=core) as llm:
            llm(PROMPT.decode(), max_tokens=2)
            assert llm.stability is not None
            llm.reset()
            assert (llm.core_set, llm.decision, llm.stability) == (None, None, None)
            assert llm.n_tokens == 0 and llm.save_state().core_set is None


def test_what_is_said_of_a_text_is_said_of_the_one_that_was_loaded(tiny):
    with load(tiny, core="stable") as llm:
        llm(PROMPT.decode(), max_tokens=2)
        state, stability = llm.save_state(), llm.stability
        llm("another", max_tokens=2)
        assert llm.stability != stability
        llm.load_state(state)
        assert llm.stability == stability
        llm.core = "auto"
        llm("another", max_tokens=2)
        assert llm.decision is not None and llm.drafting is not None
        llm.load_state(state)
        assert (llm.decision, llm.drafting, llm.stability) == (None, None, stability)
        llm.core = "auto"
        llm("another", max_tokens=2)
        llm.prompt_logprobs(llm.prompt_ids(PROMPT), 1)
        assert (llm.decision, llm.drafting, llm.stability) == (None, None, None)


def test_a_state_of_another_model_is_refused_and_nothing_is_lost(tiny, tmp_path):
    make_tiny_model(tmp_path / "other.gguf", "llama", "F32", seed=1)
    with load(str(tmp_path / "other.gguf")) as other:
        next(other.generate(PROMPT))
        state = other.save_state()
    with load(tiny) as llm:
        llm.eval([1, 2, 3])
        with pytest.raises(ValueError, match="another model"):
            llm.load_state(state)
        assert llm.eval_tokens == [1, 2, 3]


def test_a_refused_state_leaves_the_core_set(tiny):
    with load(tiny, core="stable") as llm:
        next(llm.generate(PROMPT))
        before, state = llm.core_set, llm.save_state()
        with pytest.raises(ValueError):
            llm.load_state(dataclasses.replace(state, llama_state=state.llama_state[:-3]))
        assert llm.core_set is before is not None
        with pytest.raises(TypeError, match="state is bytes; expected the LlamaState"):
            llm.load_state(state.llama_state)
        with pytest.raises(TypeError, match="core_set is 'x'; expected a CoreSet .* or None"):
            llm.set_core_set("x")


def test_an_object_can_be_pickled_without_its_text(tiny):
    with load(tiny, core=CoreConfig(beta=0.3), n_ctx=100) as llm:
        expected = take(5, llm.generate(PROMPT, temp=0))
        copy = pickle.loads(pickle.dumps(llm))
    with copy:
        assert copy.n_ctx() == 100 and copy.core == CoreConfig(beta=0.3) and copy.n_tokens == 0
        assert take(5, copy.generate(PROMPT, temp=0)) == expected
