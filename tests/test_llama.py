"""Llama on tiny random models: generations, core sets, states, errors, threads, Ctrl-C."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest

from coreinfer import CoreConfig, CoreSet, GGUFError, Llama, _core
from coreinfer.llama import ModelPathError
from make_synthetic_model import make_tiny_model

PROMPT = b"The river rose in the night, and by the morning the lower field was under water."
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A llama of 3 layers with 512 neurons and a context of 256 tokens."""
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    more = {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.add_bos_token": True}
    make_tiny_model(path, "llama", "F32", extra_metadata=more)
    return str(path)


def load(path: str, **options) -> Llama:
    # Float32 activations: what is compared token for token must not hang on 8-bit rounding.
    return Llama(path, **{"verbose": False, "seed": 1, "f32_activations": True, **options})


@pytest.fixture
def llm(tiny):
    with load(tiny) as llm:
        yield llm


def take(n: int, tokens) -> list[int]:
    return list(itertools.islice(tokens, n))


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
        assert fixed[0] == fixed[1]


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
    with pytest.raises(ValueError, match=r"returned shape \(5,\); expected \(320,\)"):
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


# --- completions ---


def test_completions_have_the_familiar_shape(llm):
    answer = llm(PROMPT.decode(), max_tokens=5, temperature=0)
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["model"] == llm.model_path
    (choice,) = answer["choices"]
    assert set(choice) == {"text", "index", "logprobs", "finish_reason"}
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    n = len(llm.tokenize(PROMPT))
    assert answer["usage"] == {
        "prompt_tokens": n,
        "completion_tokens": 5,
        "total_tokens": n + 5,
    }


@pytest.mark.parametrize("core", ["off", "stable"])
def test_a_stream_says_the_same_as_the_whole_answer(tiny, core):
    with load(tiny, core=core) as llm:
        whole = llm(PROMPT.decode(), max_tokens=40, seed=3, temperature=1.5)["choices"][0]
        chunks = list(llm(PROMPT.decode(), max_tokens=40, seed=3, temperature=1.5, stream=True))
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks[:-1])
    assert all("usage" not in c and c["id"] == chunks[0]["id"] for c in chunks)


def test_stop_strings_cut_the_text(llm):
    text = llm(PROMPT.decode(), max_tokens=40, temperature=0)["choices"][0]["text"]
    stop = text[5:9]
    answer = llm(PROMPT.decode(), max_tokens=40, temperature=0, stop=[stop, "\0never"])
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    chunks = llm(PROMPT.decode(), max_tokens=40, temperature=0, stop=stop, stream=True)
    assert "".join(c["choices"][0]["text"] for c in chunks) == text[: text.index(stop)]


def test_an_end_token_stops(llm):
    eos = llm.token_eos()
    answer = llm(PROMPT.decode(), max_tokens=9, logit_bias={eos: 1e6})
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == "" and answer["usage"]["completion_tokens"] == 0


def test_no_limit_means_the_rest_of_the_context(tiny):
    with load(tiny, n_ctx=32) as llm:
        n = len(llm.tokenize(b"The river"))
        for limit in (None, 0, -1, 500):
            answer = llm("The river", max_tokens=limit, logit_bias={llm.token_eos(): -1e9})
            assert answer["usage"]["completion_tokens"] == 32 - n
            assert answer["choices"][0]["finish_reason"] == "length"


def test_echo_and_logprobs_cover_prompt_and_answer(llm):
    text = "The river rose"
    answer = llm(text, max_tokens=3, temperature=0, echo=True, logprobs=4)["choices"][0]
    assert answer["text"].startswith(text)
    lp = answer["logprobs"]
    ids = llm.tokenize(text.encode())[1:]  # without the BOS
    assert lp["tokens"][: len(ids)] == [llm.detokenize([i]).decode() for i in ids]
    assert lp["token_logprobs"][0] is None and lp["top_logprobs"][0] is None
    assert len(lp["tokens"]) == len(ids) + 3
    offsets = np.cumsum([0, *map(len, lp["tokens"])])
    assert lp["text_offset"][: len(ids) + 1] == offsets[: len(ids) + 1].tolist()
    # The same numbers as scoring the text after its BOS.
    scores = llm.score([llm.token_bos()], ids)
    assert lp["token_logprobs"][1 : len(ids)] == pytest.approx(
        [float(scores[k, i]) for k, i in enumerate(ids)][1:], abs=1e-4
    )
    for k in range(1, len(ids)):
        best = (-scores[k]).argsort()[:4].tolist()
        best = {llm.detokenize([i]).decode("utf-8", "ignore") for i in best}
        assert best <= set(lp["top_logprobs"][k])


def sentencepiece_vocabulary() -> dict:
    """Metadata of 320 tokens that put a space before a text: marks, bytes, and a few words."""
    words = ["▁", "▁The", "▁river", "river", "▁n", "r", "i", "v", "e", "T", "h", "o", "s"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    spare = [f"<spare{i}>" for i in range(320 - len(tokens))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + spare,
        "tokenizer.ggml.token_type": types + [5] * len(spare),
        "tokenizer.ggml.scores": [-float(i) for i in range(320)],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.mark.parametrize("words", [{}, sentencepiece_vocabulary()], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_offsets_of_an_echo_point_into_the_returned_text(tmp_path, words, adds_bos):
    path = tmp_path / "model.gguf"
    more = {**words, "tokenizer.ggml.add_bos_token": adds_bos}
    make_tiny_model(path, "llama", "F32", extra_metadata=more)
    with load(str(path)) as llm:
        ends = (llm.token_bos(), llm.token_eos())
        bos, eos = (llm.detokenize([i], special=True).decode() for i in ends)
        for text in (f"{bos}The né river", f"The{eos}river {eos} rose", "  The\n", "é"):
            choice = llm(text, max_tokens=2, temperature=0, echo=True, logprobs=1)["choices"][0]
            lp, n = choice["logprobs"], len(choice["logprobs"]["tokens"]) - 2
            for offset, token in list(zip(lp["text_offset"], lp["tokens"], strict=True))[:n]:
                assert choice["text"].startswith((token, token.removeprefix(" ")), offset), text
            assert lp["text_offset"][n] == len(text)
            if text.startswith(bos):
                assert lp["tokens"][0] == bos and lp["text_offset"][1] == len(bos)
        ids = llm.tokenize(f"The{eos}river".encode(), special=True)
        choice = llm(ids, max_tokens=1, echo=True, logprobs=0)["choices"][0]
        text = llm.detokenize(ids).decode()  # ids come as text without special tokens
        assert choice["text"].startswith(text) and eos not in text
        assert choice["logprobs"]["text_offset"][-1] == len(text)


def test_prompts_longer_than_a_scoring_chunk_are_echoed_whole(llm):
    ids = np.random.default_rng(0).integers(0, 256, 150).tolist()
    rows = llm.prompt_logprobs(ids, 2)
    expected = llm.score(ids[:1], ids[1:])
    assert [p for p, _ in rows] == pytest.approx(
        expected[np.arange(149), ids[1:]].tolist(), abs=1e-4
    )
    assert [top[0][0] for _, top in rows] == expected.argmax(axis=1).tolist()
    # A prompt is read dense, whatever decoded before and decodes after.
    llm.core = CoreConfig(beta=0.1)
    next(llm.generate(PROMPT))
    assert llm.prompt_logprobs(ids, 2) == rows


def test_an_echoed_prompt_of_ids_comes_as_text(llm):
    answer = llm(llm.tokenize(b"The river"), max_tokens=1, echo=True)
    assert answer["choices"][0]["text"].startswith("The river")
    first = next(iter(llm("The river", max_tokens=1, echo=True, stream=True)))
    assert first["choices"][0]["text"] == "The river"


def test_a_template_without_bos_gets_the_one_the_model_asks_for(tmp_path):
    path = tmp_path / "template.gguf"
    more = {"tokenizer.chat_template": TEMPLATE[len("{{ bos_token }}") :]}
    make_tiny_model(path, extra_metadata={**more, "tokenizer.ggml.add_bos_token": True})
    with load(str(path)) as llm:
        ids = llm.chat_prompt_ids([{"role": "user", "content": "Where?"}])
        assert ids.tolist() == llm.tokenize(b"user: Where?\nassistant:")
        assert ids[0] == llm.token_bos()


def test_chat_goes_through_the_template(llm):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Where is it?"}]}]
    ids = llm.chat_prompt_ids(messages)
    assert llm.detokenize(ids) == b"user: Where is it?\nassistant:"
    assert ids[0] == llm.token_bos() and ids[1] != llm.token_bos()
    answer = llm.create_chat_completion(
        messages, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"]["role"] == "assistant"
    assert len(choice["logprobs"]["content"]) == 4
    assert all(len(token["top_logprobs"]) == 2 for token in choice["logprobs"]["content"])
    assert answer["usage"]["prompt_tokens"] == len(ids)
    chunks = list(llm.create_chat_completion(messages, max_tokens=4, temperature=0, stream=True))
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant"} and deltas[-1] == {}
    assert "".join(d.get("content", "") for d in deltas) == choice["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "expected a list of messages"),
        ("hello", "expected a list of messages"),
        ([{"content": "x"}], "expected a mapping with role and content"),
        ([{"role": "user", "content": 5}], "content of message 0 is int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part of type 'image_url'"),
    ],
)
def test_messages_that_are_not_text_are_refused(llm, messages, error):
    with pytest.raises(ValueError, match=error):
        llm.create_chat_completion(messages)


def test_a_model_without_template_says_so(tmp_path):
    make_tiny_model(tmp_path / "plain.gguf", "opt", "F32")
    with load(str(tmp_path / "plain.gguf")) as llm:
        assert not llm.has_chat_template
        with pytest.raises(ValueError, match="no chat template; use create_completion"):
            llm.create_chat_completion([{"role": "user", "content": "x"}])


# --- state ---


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


# --- what is wrong is said ---


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.generate([1, 320]), r"prompt\[1\] is 320; expected a token id from 0 to 319"),
        (lambda m: m.generate([-1]), r"prompt\[0\] is -1"),
        (lambda m: m.generate([2**40]), r"prompt\[0\] is 1099511627776"),
        (lambda m: m.generate([1.5]), "expected a sequence of token ids"),
        (lambda m: m.generate([[1], [2]]), "expected a sequence of token ids"),
        (lambda m: m.generate([]), "the prompt is empty"),
        (lambda m: m([]), "the prompt is empty"),
        (lambda m: m.score([], [1]), "the prompt is empty"),
        (lambda m: m.score([1], [320]), r"continuation_ids\[0\] is 320"),
        (lambda m: m.score([1] * 200, [1] * 58), r"Requested tokens \(257\) exceed .* of 256"),
        (lambda m: m.generate([1] * 257), r"Requested tokens \(257\) exceed context window of 256"),
        (lambda m: m([1] * 256), r"Requested tokens \(257\) exceed context window of 256"),
        (lambda m: m("x " * 5000), "exceed context window of 256; shorten the text"),
        (lambda m: m.eval([1] * 257), "exceed context window"),
        (lambda m: m.eval([999]), r"tokens\[0\] is 999"),
        (lambda m: m.detokenize([320]), r"tokens\[0\] is 320"),
        (lambda m: m("x", temperature=-1), "temperature is -1"),
        (lambda m: m.generate("x", top_p=2), "top_p is 2"),
        (lambda m: m("x", logprobs=-1), "logprobs is -1"),
        (lambda m: m("x", stop=[""]), "expected strings that are not empty"),
        (lambda m: m("x", suffix="y"), "does not support suffix='y'"),
        (lambda m: m("x", grammar="y"), "does not support grammar='y'"),
        (lambda m: m.create_chat_completion([{"role": "user"}], top_logprobs=2), "needs logprobs"),
        (lambda m: m.set_seed(-1), "seed is -1"),
    ],
)
def test_bad_arguments_are_value_errors_that_leave_the_object_usable(llm, call, error):
    with pytest.raises(ValueError, match=error):
        call(llm)
    assert len(take(2, llm.generate(PROMPT))) == 2


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m("x", max_tokens="5"), "max_tokens is '5'; expected an integer or None"),
        (lambda m: m("x", max_tokens=2.0), "max_tokens is 2.0"),
        (lambda m: m("x", logprobs="1"), "logprobs is '1'; expected an integer or None"),
        (lambda m: m("x", logprobs=True), "logprobs is True"),
        (lambda m: m("x", stop=b"y"), "stop is b'y'; expected a string, or a list of strings"),
        (lambda m: m("x", stop=5), "stop is 5"),
        (lambda m: m("x", logits_processor=5), "logits_processor is 5; expected a callable"),
        (lambda m: m.generate("x", stopping_criteria=[5]), r"stopping_criteria is \[5\]"),
        (lambda m: m.sample(logits_processor="x"), "logits_processor is 'x'"),
        (lambda m: load(m.model_path, prefill_progress=5), "prefill_progress is 5"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(llm, call, error):
    with pytest.raises(TypeError, match=error):
        call(llm)


def test_an_empty_text_is_the_bos_or_an_error(tiny, tmp_path):
    with load(tiny) as llm:
        assert llm("", max_tokens=1)["usage"]["prompt_tokens"] == 1
    path = tmp_path / "nobos.gguf"
    make_tiny_model(path, extra_metadata={"tokenizer.ggml.add_bos_token": False})
    with load(str(path)) as llm, pytest.raises(ValueError, match="empty.*adds no BOS"):
        llm("")


def test_sampling_before_reading_is_an_error(llm):
    with pytest.raises(RuntimeError, match="nothing to sample from; call eval first"):
        llm.sample()


def test_a_memory_limit_that_cannot_be_met_says_what_is_needed(tiny):
    with pytest.raises(MemoryError, match="memory_limit is 1.0 MiB, but .* MiB are needed"):
        load(tiny, memory_limit="1MiB")
    with load(tiny, memory_limit="64GiB", core="stable") as llm:
        assert len(take(2, llm.generate(PROMPT))) == 2


def test_unknown_arguments_suggest_the_nearest(llm):
    with pytest.raises(TypeError, match="'max_token'; did you mean 'max_tokens'"):
        llm("x", max_token=3)
    with pytest.raises(TypeError, match="'temperature'; did you mean|unexpected.*'temperature'"):
        llm.generate("x", temperature=3)
    with pytest.raises(TypeError, match="'n_contxt'"):
        Llama(llm.model_path, n_contxt=3)


def test_foreign_arguments_warn_once(tiny):
    with pytest.warns(UserWarning, match="n_ubatch, flash_attn") as caught:
        load(tiny, n_ubatch=1, flash_attn=True).close()
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_gpu_is_asked_of_the_core_and_never_ignored(tiny, monkeypatch):
    asked = {}
    engine = _core.Engine

    def remember(path, **options):
        asked.update(options)
        return engine(path, **{**options, "n_gpu_layers": 0, "main_gpu": 0, "vram_limit": 0})

    monkeypatch.setattr(_core, "Engine", remember)
    load(tiny, n_gpu_layers=-1, main_gpu=1, vram_limit="1GiB").close()
    assert (asked["n_gpu_layers"], asked["main_gpu"], asked["vram_limit"]) == (-1, 1, 1 << 30)


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(ModelPathError, match="does not exist") as error:
        Llama(tmp_path / "none.gguf")
    assert isinstance(error.value, FileNotFoundError) and isinstance(error.value, ValueError)
    with pytest.raises(ValueError, match="known model: use coreinfer.resolve_model"):
        Llama("smollm2")
    (tmp_path / "text.gguf").write_text("this is no model, but it is long enough for a header")
    with pytest.raises(GGUFError):
        Llama(tmp_path / "text.gguf")
    with pytest.raises(OSError):
        Llama(tmp_path)


def test_a_model_path_need_not_be_utf8(tiny, tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff.gguf"
    with pytest.raises(ModelPathError, match="does not exist"):
        Llama(odd)
    os.symlink(tiny, odd)
    with load(odd) as llm:
        assert os.fsencode(llm.model_path) == odd


def test_a_closed_object_says_so(tiny):
    llm = load(tiny)
    tokens = llm.generate(PROMPT)
    next(tokens)
    llm.close()
    llm.close()
    for call in (
        lambda: next(tokens),
        lambda: llm("x"),
        lambda: next(llm.generate([1])),
        lambda: llm.eval([1]),
        llm.reset,
        llm.n_ctx,
        llm.n_vocab,
        lambda: llm.timings,
        lambda: llm.core_set,
        lambda: llm.score([1], [1]),
        llm.save_state,
        llm.__enter__,
    ):
        with pytest.raises(RuntimeError, match="this Llama is closed"):
            call()


def test_silent_unless_verbose(tiny, capfd):
    with load(tiny) as llm:
        llm("x", max_tokens=1)
    assert capfd.readouterr() == ("", "")
    with load(tiny, verbose=True) as llm:
        llm("x", max_tokens=1)
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "llama, 3 layers, context 256" in err


def test_two_objects_work_in_two_threads(tiny):
    with load(tiny, n_threads=1, core="stable") as llm:
        expected = [take(40, llm.generate([i, 5, 9], temp=0)) for i in range(2)]
    got: dict[int, list[int]] = {}

    def work(i: int) -> None:
        with load(tiny, n_threads=1, core="stable") as llm:
            got[i] = take(40, llm.generate([i, 5, 9], temp=0))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[0], got[1]] == expected


def test_one_object_refuses_a_second_caller_while_it_computes(tiny):
    seen: list[str] = []

    def meddle(done: int, total: int) -> None:
        try:
            llm.eval([1])
        except RuntimeError as error:
            seen.append(str(error))

    with load(tiny, prefill_progress=meddle) as llm:
        llm(PROMPT.decode(), max_tokens=1)
    assert seen and "computing in another thread" in seen[0]


def test_an_older_generation_does_not_go_on_in_a_newer_text(llm):
    older = llm.generate(PROMPT)
    next(older)
    next(llm.generate([1, 2, 3]))
    with pytest.raises(RuntimeError, match="the cache now holds another text"):
        next(older)


def test_prefill_progress_counts_to_the_end(tiny):
    seen = []
    with load(tiny, n_batch=16, prefill_progress=lambda *a: seen.append(a)) as llm:
        n = len(llm.tokenize(PROMPT))
        llm(PROMPT.decode(), max_tokens=1)
    assert seen[-1] == (n, n) and len(seen) == -(-n // 16)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_exception_in_a_callback_comes_out_and_leaves_the_object_usable(tiny):
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError("mine")

    with load(tiny, prefill_progress=fail) as llm:
        with pytest.raises(ZeroDivisionError, match="mine"):
            llm(PROMPT.decode(), max_tokens=1)
        llm.prefill_progress = None
        assert llm.n_tokens == 0 and len(take(3, llm.generate(PROMPT))) == 3


def interrupt_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_stops_decoding_and_leaves_the_object_usable(tiny):
    with load(tiny, n_ctx=100_000, core="stable") as llm:
        expected = take(5, llm.generate(PROMPT, temp=0))
        timer = interrupt_after(0.3)
        with pytest.raises(KeyboardInterrupt):
            for _ in llm.generate(PROMPT, temp=0):
                pass
        timer.join()
        assert take(5, llm.generate(PROMPT, temp=0)) == expected


def test_ctrl_c_stops_a_long_prefill_and_leaves_the_object_usable(smollm2_path):
    with Llama(smollm2_path, verbose=False) as llm:
        ids = np.random.default_rng(0).integers(5, 40_000, 4000)
        begun = time.monotonic()
        timer = interrupt_after(0.3)
        with pytest.raises(KeyboardInterrupt):
            llm.eval(ids)  # many seconds' work
        timer.join()
        stopped = time.monotonic() - begun
        assert llm.n_tokens == 0
        assert len(take(2, llm.generate("The capital of France is"))) == 2
        assert stopped < 5


def test_from_pretrained_asks_the_hub_for_the_one_file_that_fits(tiny, monkeypatch):
    hub = types.ModuleType("huggingface_hub")
    hub.list_repo_files = lambda repo: ["README.md", "model-q4.gguf", "model-q8.gguf"]
    asked = []

    def download(repo, name, local_dir, cache_dir):
        asked.append((repo, name, local_dir, cache_dir))
        return tiny

    hub.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with Llama.from_pretrained("a/b", "*q4.gguf", cache_dir="c", verbose=False, n_ctx=64) as llm:
        assert llm.n_ctx() == 64
    assert asked == [("a/b", "model-q4.gguf", None, "c")]
    with pytest.raises(ValueError, match="2 files of a/b fit"):
        Llama.from_pretrained("a/b", "*.gguf")
    with pytest.raises(ValueError, match="filename is None"):
        Llama.from_pretrained("a/b", None)


# --- a real model ---


def test_a_real_model_answers(smollm2_path):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    for core in ("off", CoreConfig(beta=0.8)):
        with Llama(smollm2_path, core=core, verbose=False, f32_activations=True) as llm:
            answer = llm.create_chat_completion(question, temperature=0, max_tokens=24)
            assert "Paris" in answer["choices"][0]["message"]["content"]
