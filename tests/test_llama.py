"""Llama on a tiny random model: generations, core sets, facts about the model."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer import CoreConfig, CoreSet, Llama
from make_synthetic_model import make_tiny_model
from tiny_llama import PROMPT, load, take

# --- generation ---


def test_generates_until_the_context_is_full(tiny):
    with load(tiny, n_ctx=40) as llm:
        prompt = llm.tokenize(PROMPT)[:30]
        # 10 more fit the cache, and the last logits give one beyond them.
        assert len(list(llm.generate(prompt, temp=0))) == 11
        assert llm.n_tokens == 40


def test_text_and_ids_give_the_same_generation(llm):
    ids = llm.tokenize(PROMPT)
    assert take(8, llm.generate(PROMPT, temp=0)) == take(8, llm.generate(ids, temp=0))
    assert take(8, llm.generate(PROMPT.decode(), temp=0)) == take(8, llm.generate(ids, temp=0))


@pytest.mark.parametrize("core", ["off", "stable"])
def test_greedy_ids_are_the_same_on_one_and_two_threads_and_again(tiny, core):
    runs = []
    for n_threads in (1, 2):
        with load(tiny, n_threads=n_threads, core=core) as llm:
            runs += [take(30, llm.generate(PROMPT, temp=0)) for _ in range(2)]
    assert all(run == runs[0] for run in runs)


def test_sent_ids_follow_the_yielded_token(llm):
    prompt = llm.tokenize(PROMPT)
    tokens = llm.generate(prompt, temp=0)
    first = next(tokens)
    sent = llm.tokenize(b" door", add_bos=False)
    after = tokens.send(sent)
    assert llm.eval_tokens == [*prompt, first, *sent]
    assert after == next(llm.generate([*prompt, first, *sent], temp=0))


def test_reset_keeps_what_the_prompts_share(llm):
    prompt = llm.tokenize(PROMPT)
    next(llm.generate(prompt))
    longer = [*prompt, *llm.tokenize(b" The children stood", add_bos=False)]
    again = take(5, llm.generate(longer, temp=0))
    assert llm.timings.reused_tokens == len(prompt)
    assert llm.timings.prefill_tokens == len(longer) - len(prompt)
    llm.reset()
    assert take(5, llm.generate(longer, temp=0)) == again
    assert llm.timings.reused_tokens == 0


def test_what_a_stopping_criterion_ends_is_a_stop(llm):
    n = len(llm.tokenize(PROMPT))
    answer = llm(PROMPT.decode(), max_tokens=9, stopping_criteria=lambda ids, _: len(ids) >= n + 2)
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_without_reset_the_prompt_is_appended(llm):
    prompt = llm.tokenize(PROMPT)
    llm.eval(prompt[:10])
    expected = take(5, llm.generate(prompt, temp=0))
    llm.reset()
    llm.eval(prompt[:10])
    assert take(5, llm.generate(prompt[10:], temp=0, reset=False)) == expected
    assert llm.eval_tokens[: len(prompt)] == prompt


def test_eval_and_sample_walk_like_generate(llm):
    expected = take(6, llm.generate(PROMPT, temp=0))
    llm.reset()
    llm.eval(llm.tokenize(PROMPT))
    got = []
    for _ in range(6):
        got.append(llm.sample(temp=0))
        llm.eval(got[-1:])
    assert got == expected


def test_seeds_repeat_a_generation_and_differ_from_each_other(tiny):
    with load(tiny, seed=5) as llm:
        first = [take(20, llm.generate(PROMPT, temp=2.0)) for _ in range(2)]
        llm.set_seed(5)
        assert [take(20, llm.generate(PROMPT, temp=2.0)) for _ in range(2)] == first
        assert first[0] != first[1]
        fixed = [take(20, llm.generate(PROMPT, temp=2.0, seed=9)) for _ in range(2)]
        free = [take(20, llm.generate(PROMPT, temp=2.0, seed=-1)) for _ in range(2)]
        assert fixed[0] == fixed[1] and free[0] != free[1]
    with load(tiny, seed=-1) as one, load(tiny, seed=-1) as other:
        drawn = [take(20, llm.generate(PROMPT, temp=2.0)) for llm in (one, other)]
        assert drawn[0] != drawn[1]


def test_penalties_count_the_prompt_and_what_follows(llm):
    prompt = llm.tokenize(PROMPT)
    ids = take(30, llm.generate(prompt, temp=0, frequency_penalty=1e4))
    assert len({*ids}) == len(ids)
    assert not {*ids} & {*prompt[-30:]}


def test_a_logit_bias_forces_and_forbids(llm):
    assert take(3, llm.generate(PROMPT, temp=0, logit_bias={7: 1e6})) == [7, 7, 7]
    best = next(llm.generate(PROMPT, temp=0))
    assert next(llm.generate(PROMPT, temp=0, logit_bias={best: float("-inf")})) != best
    with pytest.raises(ValueError, match="logit_bias names token 320; expected 0 to 319"):
        next(llm.generate(PROMPT, logit_bias={320: 1.0}))


def test_logits_processors_and_stopping_criteria_see_ids_and_logits(llm):
    prompt = llm.tokenize(PROMPT)

    def only_nine(ids, logits):
        assert ids.tolist()[: len(prompt)] == prompt
        out = np.full_like(logits, -np.inf)
        out[9] = 0
        return out

    def long_enough(ids, logits):
        return len(ids) >= len(prompt) + 3 and logits.shape == (320,)

    tokens = llm.generate(prompt, logits_processor=[only_nine], stopping_criteria=long_enough)
    assert list(tokens) == [9, 9, 9]
    with pytest.raises(ValueError, match=r"returned shape \(5,\); expected shape \(320,\)"):
        next(llm.generate(prompt, logits_processor=lambda ids, logits: logits[:5]))


@pytest.mark.parametrize("types", [("q8_0", "q8_0"), ("f32", "f16"), (8, 1)])
def test_cache_types_change_little(tiny, types):
    with load(tiny, type_k="f32", type_v="f32") as llm:
        expected = llm.score(llm.tokenize(PROMPT), [1, 2, 3])
    with load(tiny, type_k=types[0], type_v=types[1]) as llm:
        got = llm.score(llm.tokenize(PROMPT), [1, 2, 3])
    assert not np.array_equal(got, expected)
    # 8-bit keys and values are good to about 1/250, and logits here spread over a few units.
    assert np.abs(got - expected).max() < 0.3


# --- core neurons ---


def test_the_core_set_is_there_to_look_at(tiny):
    with load(tiny, core=CoreConfig(beta=0.25, layers=(1, 3))) as llm:
        assert llm.core_set is None
        next(llm.generate(PROMPT))
        core = llm.core_set
        assert core.layers[0] is None and core.sizes == [512, 128, 128]
        for layer, scores in zip(core.layers[1:], core.scores[1:], strict=True):
            # The set is the 128 highest scores, ties to the lower index.
            expected = np.sort(np.lexsort((np.arange(512), -scores))[:128])
            assert np.array_equal(layer, expected)
        assert core.n_tokens == len(llm.tokenize(PROMPT))
        assert -1 <= core.stability <= 1
        assert (core.statistic, core.alpha, core.beta) == ("flock", 0.4, 0.25)
        assert core.fingerprint == llm.fingerprint
        next(llm.generate([5]))
        assert llm.core_set.stability is None  # one token has no first half


def test_the_first_token_comes_from_dense_logits_and_the_next_from_the_core(tiny):
    with load(tiny) as dense, load(tiny, core=CoreConfig(beta=0.1)) as core:
        prompt = dense.tokenize(PROMPT)
        a, b = dense.score(prompt, [1, 2, 3]), core.score(prompt, [1, 2, 3])
    assert np.array_equal(a[0], b[0])
    assert np.abs(a[1:] - b[1:]).max() > 0.01


def test_all_neurons_decode_as_dense_does(tiny):
    with load(tiny) as dense, load(tiny, core=CoreConfig(beta=1.0)) as core:
        prompt = dense.tokenize(PROMPT)
        assert np.array_equal(dense.score(prompt, [1, 2, 3]), core.score(prompt, [1, 2, 3]))


def test_score_is_what_generation_reports(tiny):
    with load(tiny, core="stable") as llm:
        prompt = llm.tokenize(PROMPT)
        answer = llm(prompt, max_tokens=6, temperature=0, logprobs=1)
        reported = answer["choices"][0]["logprobs"]["token_logprobs"]
        generated = llm.core_set
        tokens = take(6, llm.generate(prompt, temp=0))
        llm.reset()  # the same chunks of prefill, so that the cache is the same to the bit
        scores = llm.score(prompt, tokens)
        assert llm.core_set.same_neurons(generated)
    assert scores.shape == (6, 320) and scores.dtype == np.float32
    assert np.exp(scores.astype(np.float64)).sum(axis=1) == pytest.approx(np.ones(6), abs=1e-5)
    # Both are float32 logits minus a logarithm taken in double.
    assert scores[np.arange(6), tokens] == pytest.approx(reported, abs=1e-6)


def test_score_of_nothing_has_no_rows(llm):
    assert llm.score([1, 2], []).shape == (0, 320)


def test_fewer_weights_are_read_with_core_neurons(tiny):
    with load(tiny, core="stable") as llm:
        take(5, llm.generate(PROMPT))
        t = llm.timings
        assert t.decode_weight_bytes < t.dense_weight_bytes
        assert t.compact_bytes > 0 and t.decode_tokens == 4
        assert t.prefill_tokens == len(llm.tokenize(PROMPT))
        llm.core = "off"
        take(2, llm.generate(PROMPT))
        assert llm.timings.decode_weight_bytes == t.dense_weight_bytes
        assert llm.core_set is None and llm.timings.compact_bytes == 0


def test_a_saved_set_decodes_the_same_when_handed_in(tiny, tmp_path):
    with load(tiny, core="stable") as llm:
        expected = take(20, llm.generate(PROMPT, temp=0))
        llm.core_set.save(tmp_path / "core.npz")
        dense = take(20, Llama.generate(load(tiny), PROMPT, temp=0))
    loaded = CoreSet.load(tmp_path / "core.npz")
    with load(tiny, core=loaded) as llm:
        assert take(20, llm.generate(PROMPT, temp=0)) == expected
        assert llm.core_set is loaded
        llm.set_core_set(None)
        assert take(20, llm.generate(PROMPT, temp=0)) == dense
        llm.set_core_set(loaded)
        assert take(20, llm.generate(PROMPT, temp=0)) == expected
    assert dense != expected


def test_a_set_of_another_model_is_refused(tiny, tmp_path):
    make_tiny_model(tmp_path / "other.gguf", "llama", "F32", seed=1)
    with load(tiny, core="stable") as llm:
        next(llm.generate(PROMPT))
        core = llm.core_set
    with pytest.raises(ValueError, match="belongs to another model"):
        load(str(tmp_path / "other.gguf"), core=core)
    with load(str(tmp_path / "other.gguf"), core=core.for_any_model()) as other:
        next(other.generate(PROMPT))
    with load(tiny) as llm, pytest.raises(ValueError, match="3 layers with 512"):
        llm.core = CoreSet(layers=[[1], [2]], n_ff=512)


def test_a_growing_chat_replays_the_reply_dense(tiny):
    """Entries that core neurons wrote are not kept, so the next core set is a fresh prompt's."""
    with load(tiny, core="stable") as llm, load(tiny, core="stable") as fresh:
        prompt = llm.tokenize(PROMPT)
        reply = take(12, llm.generate(prompt, temp=0))
        longer = [*prompt, *reply, *llm.tokenize(b" The clock was taken", add_bos=False)]
        ids = take(5, llm.generate(longer, temp=0))
        assert 0 < llm.timings.reused_tokens <= len(prompt)
        assert take(5, fresh.generate(longer, temp=0)) == ids
        assert fresh.timings.reused_tokens == 0
        # Sums over the same tokens in other chunks: DESIGN's bound for float32 activations.
        assert llm.core_set.similarity(fresh.core_set) >= 0.99
        assert llm.core_set.n_tokens == len(longer)


def test_another_alpha_counts_anew(tiny):
    with load(tiny, core=CoreConfig(statistic="count", alpha=0.4)) as llm:
        next(llm.generate(PROMPT))
        llm.core = CoreConfig(statistic="count", alpha=0.1)
        next(llm.generate(PROMPT))
        assert llm.timings.reused_tokens == 0
        scores = llm.core_set.scores[0]
    with load(tiny, core=CoreConfig(statistic="count", alpha=0.1)) as fresh:
        next(fresh.generate(PROMPT))
        assert np.array_equal(fresh.core_set.scores[0], scores)


def test_layers_beyond_the_model_are_refused(tiny):
    with pytest.raises(ValueError, match="1:4.*<= 3, the model's layers"):
        load(tiny, core=CoreConfig(layers=(1, 4)))


def test_facts_about_the_model(llm):
    assert (llm.n_vocab(), llm.n_ctx(), llm.n_embd()) == (320, 256, 256)
    assert llm.metadata["general.architecture"] == "llama"
    assert llm.detokenize([llm.token_nl()]) == b"\n"
    assert llm.backend.n_threads >= 1 and llm.backend.name and llm.backend.isa
    llm.eval([1, 2, 3])
    assert llm.input_ids.tolist() == [1, 2, 3] == llm.eval_tokens and llm.n_tokens == 3
    assert llm.eval_logits.shape == (1, 320)
    assert llm.detokenize(llm.tokenize(PROMPT)) == PROMPT
    ids = llm.tokenize(PROMPT)
    assert (
        llm.detokenize(ids[3:], prev_tokens=ids[:3])
        == llm.detokenize(ids)[len(llm.detokenize(ids[:3])) :]
    )


# --- a real model ---


def test_a_real_model_answers(smollm2_path):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    for core in ("off", CoreConfig(beta=0.8)):
        with Llama(smollm2_path, core=core, verbose=False, f32_activations=True) as llm:
            answer = llm.create_chat_completion(question, temperature=0, max_tokens=24)
            assert "Paris" in answer["choices"][0]["message"]["content"]
