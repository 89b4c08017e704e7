"""Completions and chats: their shape, streams, stop strings, echo and log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer import CoreConfig
from make_synthetic_model import make_tiny_model
from tiny_llama import PROMPT, TEMPLATE, load


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
