"""Exact mode: the text of dense decoding, bit for bit, whatever is drafted."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
from coreinfer._core.testing import DraftPace, text_drafts

import measure_exact
import measure_start
from coreinfer import CoreConfig, Llama, _core
from make_synthetic_model import make_tiny_model
from measure_exact import Answer
from measure_refresh import compare, forced
from small_clusters import write_texts


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    made = {}

    def get(arch: str, dtype: str = "Q8_0") -> _core.Engine:
        if (arch, dtype) not in made:
            path = tmp_path_factory.mktemp("exact") / f"{arch}.gguf"
            make_tiny_model(path, arch, dtype)
            made[arch, dtype] = _core.Engine(str(path))
        return made[arch, dtype]

    return get


def ids(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 320, n, dtype=np.int32)


def continuation(session: _core.Session, n: int, **sampling) -> tuple[list[int], np.ndarray]:
    """n tokens drawn after the cache, and the logits behind each."""
    sampler = _core.Sampler(**({"temperature": 0.0} | sampling))
    tokens, rows = [], []
    for _ in range(n):
        token = session.sample(sampler)
        session.decode(token, sampler)
        tokens.append(token)
        rows.append(session.logits())
    return tokens, np.array(rows)


def prepared(engine: _core.Engine, exact: bool, statistic: str = "flock", **spec) -> _core.Session:
    session = _core.Session(engine, n_ctx=256, n_batch=16)  # all rows as exact as decoding's
    session.prefill(ids(24), statistic=statistic)
    if exact:
        session.set_exact(**({"paced": False, "max_drafts": 4} | spec))
    return session


GREEDY = {"temperature": 0.0}
WARM = {"temperature": 1.2, "seed": 5, "top_k": 0, "min_p": 0.0}
PENALISED = {"temperature": 0.7, "seed": 2, "repeat_penalty": 1.3, "presence_penalty": 0.4}


@pytest.mark.parametrize(
    "arch",
    [
        "llama",
        "llama-relu",
        "qwen2",
        "gemma2",
        "gemma3",
        "phi3",
        "granite",
        "smollm3",
        "olmo2",
        "opt",
    ],
)
@pytest.mark.parametrize("sampling", [GREEDY, WARM, PENALISED], ids=["greedy", "warm", "penalties"])
@pytest.mark.parametrize("source", ["core", "text", "both"])
def test_exact_mode_is_dense_decoding_bit_for_bit(engines, arch, sampling, source):
    dense, exact = (
        prepared(engines(arch), on, core=source != "text", text=source != "core")
        for on in (False, True)
    )
    tokens, logits = continuation(dense, 80, **sampling)
    got, rows = continuation(exact, 80, **sampling)
    assert got == tokens
    np.testing.assert_array_equal(rows, logits)
    assert exact.tokens == dense.tokens and exact.n_dense == exact.n_past
    if source == "core":
        assert exact.timings["drafted_tokens"] > 40
        assert exact.timings["drafted_tokens"] > exact.timings["accepted_tokens"]


def test_drafts_of_all_neurons_all_come_true(engines):
    exact = prepared(engines("llama"), True, beta=1.0, text=False)
    continuation(exact, 51)
    t = exact.timings
    # 10 rounds of one token and its 4 drafts, and one that was not judged to its end.
    assert t["accepted_tokens"] == 40 and t["verifications"] == 11
    assert exact.expected is not None


@pytest.mark.parametrize("statistic", ["count", "count_gate", "flock"])
def test_statistics_of_exact_decoding_are_those_of_a_prefill(engines, statistic):
    exact = prepared(engines("llama"), True, statistic)
    tokens, _ = continuation(exact, 60, **WARM)
    whole = np.concatenate([ids(24), np.array(tokens, np.int32)])
    fresh = _core.Session(engines("llama"), n_ctx=256, n_batch=16)
    fresh.prefill(whole, statistic=statistic)
    assert exact.reusable(np.append(whole, np.int32(1)), statistic) == len(whole)
    a, b = exact.select(beta=0.4), fresh.select(beta=0.4)
    assert a.n_tokens == b.n_tokens == len(whole)
    for one, other in zip(a.scores, b.scores, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_drafting_neurons_follow_a_text_that_goes_elsewhere(engines):
    exact = prepared(engines("llama"), True, beta=0.2, text=False)
    exact.decode(1)
    at_first = exact.core_set
    for _ in range(12):
        exact.decode(int(exact.expected or 1))
    assert exact.core_set.same_neurons(at_first)  # hardly a new text
    for token in [7, 9] * 50:
        exact.decode(token)
    now = exact.core_set
    assert not now.same_neurons(at_first)
    shares = [
        len(np.intersect1d(a, b)) / len(a) for a, b in zip(at_first.layers, now.layers, strict=True)
    ]
    assert np.mean(shares) < 0.9


def test_a_text_continues_after_exact_decoding_as_after_dense(engines):
    sessions = [prepared(engines("llama"), on) for on in (False, True)]
    for session in sessions:
        continuation(session, 13, **WARM)
        session.prefill(ids(7, seed=3), statistic=None if not session.exact else "flock")
    np.testing.assert_array_equal(sessions[0].logits(), sessions[1].logits())
    assert continuation(sessions[0], 20)[0] == continuation(sessions[1], 20)[0]


def test_keeping_less_forgets_what_was_expected(engines):
    exact, dense = prepared(engines("llama"), True, beta=1.0), prepared(engines("llama"), False)
    first, _ = continuation(exact, 8)
    assert exact.expected is not None
    exact.keep(26)
    assert exact.expected is None
    for token in first[:2]:
        dense.decode(token)
    for session in (exact, dense):
        session.decode(3)
    np.testing.assert_array_equal(exact.logits(), dense.logits())


def test_a_saved_state_continues_as_if_nothing_had_been_expected(engines):
    exact = prepared(engines("llama"), True, beta=1.0)
    continuation(exact, 7)
    state = exact.save_state()
    rest = continuation(exact, 20)[0]
    other = _core.Session(engines("llama"), n_ctx=256)
    other.load_state(state)
    assert not other.exact
    other.set_core(None)
    assert continuation(other, 20)[0] == rest


def test_scores_in_exact_mode_are_dense(engines):
    dense, exact = prepared(engines("llama"), False), prepared(engines("llama"), True)
    continuation(exact, 5)
    continuation(dense, 5)
    np.testing.assert_array_equal(exact.score(ids(9, 1)), dense.score(ids(9, 1)))


def test_drafts_end_where_the_context_does(engines):
    session = _core.Session(engines("llama"), n_ctx=30)
    session.prefill(ids(24), statistic="flock")
    session.set_exact(paced=False, max_drafts=15)
    continuation(session, 6)
    assert session.n_past == 30
    with pytest.raises(ValueError, match="exceed context window of 30"):
        session.decode(1)


def test_a_text_decoded_with_core_neurons_is_not_continued_exactly(engines):
    session = prepared(engines("llama"), False)
    session.set_core(session.select(beta=0.4))
    session.decode(1)
    session.set_exact()
    with pytest.raises(RuntimeError, match="1 positions were decoded with core neurons"):
        session.decode(2)
    session.keep(session.n_dense)
    session.prefill(np.array([1], np.int32), statistic="flock")
    session.decode(2)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"max_drafts": 16}, {"max_drafts": -1}])
def test_bad_settings_are_refused(engines, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        _core.Session(engines("llama")).set_exact(**wrong)


def test_llama_writes_the_dense_text_in_exact_mode(tmp_path):
    path = tmp_path / "tiny.gguf"
    make_tiny_model(path, "llama", "Q8_0")
    texts = []
    for core in ("off", CoreConfig(mode="exact", beta=0.6, max_drafts=3)):
        # Batches of 16: how much of the prompt is read again then changes no bit.
        llm = Llama(str(path), core=core, verbose=False, seed=11, n_batch=16)
        texts.append([llm("ab" * 20, max_tokens=60, temperature=t) for t in (0.0, 0.9)])
        llm.core = "off"  # the session goes back to plain dense decoding
        assert not llm._session.exact or llm("ab", max_tokens=2) and not llm._session.exact
    for dense, exact in zip(*texts, strict=True):
        assert exact["choices"] == dense["choices"]


def test_refresh_reads_the_answer_again_dense(tmp_path):
    path = tmp_path / "tiny.gguf"
    make_tiny_model(path, "llama", "Q8_0")
    llm = Llama(str(path), core=CoreConfig(beta=0.3, refresh=8), verbose=False)
    taken = []
    for token in llm.generate("ab" * 20, temp=0):
        taken.append(token)
        if len(taken) == 30:
            break
    # 29 tokens were decoded; after each 8th the cache was dense again and the set had their scores
    assert llm.timings.replay_tokens == 24
    assert llm.core_set.n_tokens == llm.n_tokens - 29 + 24
    prompt = llm.tokenizer().tokenize(b"ab" * 20)
    dense = Llama(str(path), core="off", verbose=False, n_batch=16)
    dense.eval(prompt + taken[:24])
    assert llm._session.n_dense == len(prompt) + 24


# Here and in the measured refresh the same tokens come in one large batch and in few rows: only in
# float32 do both round alike on every instruction set.
@pytest.mark.parametrize("patch", [False, 8])
def test_an_answer_may_begin_dense_and_choose_by_its_beginning(tmp_path, patch):
    path = tmp_path / "tiny.gguf"
    make_tiny_model(path, "llama", "Q8_0")
    core = CoreConfig(beta=0.3, start=12, patch=patch)
    with Llama(str(path), core=core, f32_activations=True, verbose=False) as llm:
        prompt = llm.prompt_ids("ab" * 20)
        chosen, taken = [], []
        for token in itertools.islice(llm.generate(prompt, temp=0), 20):
            chosen.append(llm.core_set)
            taken.append(token)
        # Twelve tokens are in the cache before the thirteenth is drawn, and were read again once.
        assert chosen[:12] == [None] * 12 and llm.timings.replay_tokens == 12
        assert chosen[12] is not None and chosen[12].n_tokens == prompt.size + 12
        assert llm.core_set.patch_rank == int(patch)
        t = llm.timings  # of 19 tokens in the cache
        assert t.decode_bytes == 12 * t.dense_weight_bytes + 7 * t.decode_weight_bytes
        assert t.decode_weight_bytes < t.dense_weight_bytes
        assert t.decode_gb_per_second == pytest.approx(t.decode_bytes / t.decode_seconds / 1e9)
        scores = llm.score(prompt, taken)
        short = llm.score(prompt, taken[:12])
        assert llm.core_set is None
        np.testing.assert_array_equal(short, scores[:12])
        assert scores.argmax(axis=1).tolist() == taken

        llm.core = "off"
        dense = llm.score(prompt, taken)
        np.testing.assert_array_equal(dense[:13], scores[:13])
        llm.core = replace(core, start=0)
        later = llm.score(np.concatenate([prompt, np.array(taken[:12], np.int32)]), taken[12:])
        np.testing.assert_allclose(later, scores[12:], atol=1e-4)
        assert np.abs(dense[13:] - scores[13:]).max() > 1e-3


def test_what_a_dense_beginning_buys_is_measured_on_the_same_tokens(tmp_path, capsys, monkeypatch):
    model, data = tmp_path / "tiny.gguf", tmp_path / "texts.jsonl"
    make_tiny_model(model, "llama", "Q8_0")
    write_texts(data, "text")
    argv = f"measure_start {model} --data {data} --prompts 2 --length 12 --tokens 6 --starts 4 8"
    monkeypatch.setattr(sys, "argv", [*argv.split(), "--betas", "0.3", "1", "--temp", "0.8"])
    measure_start.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0].split(",")[0].strip() for row in rows] == ["N = 4"] * 2 + ["N = 8"] * 2
    for cells in rows:
        kl = [float(cell.split()[0]) for cell in cells[1:]]
        if "β = 1 " in cells[0]:  # all neurons
            assert max(kl) < 1e-3 and all(cell.endswith(", 1.00 ") for cell in cells[1:4])
        else:
            assert min(kl[:3]) > 0 and kl[3] == pytest.approx(kl[2] - kl[1], abs=0.002)
    monkeypatch.setattr(sys, "argv", [*argv.split(), "--starts", "0"])
    with pytest.raises(SystemExit, match="--starts must be 1 or more"):
        measure_start.main()


def test_measured_refresh_is_what_a_generation_does(tmp_path):
    path = tmp_path / "tiny.gguf"
    make_tiny_model(path, "llama", "Q8_0")
    core = CoreConfig(beta=0.3, refresh=8, patch=False)
    with Llama(str(path), core=core, f32_activations=True, verbose=False) as llm:
        prompt = llm.prompt_ids("ab" * 20)
        taken = np.array(list(itertools.islice(llm.generate(prompt, temp=0), 25)), np.int32)
        llm.core = replace(core, refresh=None)
        refreshed = forced(llm, prompt, taken, 8)
        fixed = forced(llm, prompt, taken, None)
        assert refreshed.shape == fixed.shape == (25, llm.n_vocab())
        assert refreshed.argmax(axis=1).tolist() == taken.tolist()
        assert np.abs(refreshed[:8] - fixed[:8]).max() < 1e-4 < np.abs(refreshed - fixed).max()

        pieces = [np.concatenate([prompt, taken])]
        kl = compare(llm, pieces, prompt.size, llm.core, [None, 1])
        assert kl[None].shape == (1, 25) and kl[None][0, 1:].mean() > 0.01
        assert np.abs(kl[1]).max() < 1e-4  # every token from a dense prefill


# --- how much to draft ---


def pace(*, dense: float = 1.0, draft: float = 0.5, row: float = 0.05, right: int = 4) -> DraftPace:
    """After 60 rounds of 4 drafts, of which `right` came true."""
    p = DraftPace()
    for _ in range(200):
        p.verified(1, dense)
    for _ in range(60):
        p.drafted(4, 4 * draft)
        p.verified(5, dense * (1 + 4 * row))
        p.judged(4, right)
        if _ % 20 == 0:
            p.verified(1, dense)
    return p


def test_cheap_and_right_drafts_are_drafted():
    assert pace().length(8) == 8
    assert pace().gain() > 1.5


def test_wrong_drafts_are_not():
    p = pace(right=0)
    assert p.gain() == 1.0
    assert p.length(8) == 0


def test_drafts_as_slow_as_dense_decoding_are_not():
    assert pace(draft=1.0).length(8) == 0


def test_the_first_steps_are_dense():
    p = DraftPace()
    assert p.length(8) == 0
    p.verified(1, 1.0)
    assert p.length(8) == 0


def test_trying_waits_until_a_fiftieth_of_the_time_pays_for_it():
    p, steps = DraftPace(), 0
    while p.length(8) == 0:
        p.verified(1, 1.0)
        steps += 1
    assert 50 <= steps <= 400
    assert p.length(8, entry=2.0) == 0


def test_what_failed_is_tried_ever_more_rarely():
    p, tries = DraftPace(), []
    for token in range(20000):
        n = p.length(8)
        if n == 0:
            p.verified(1, 1.0)
        else:
            p.drafted(n, 0.5 * n)
            p.verified(n + 1, 1.0 + 0.1 * n)
            p.judged(n, 0)
            tries.append(token)
    assert 3 <= len(tries) <= 40
    assert tries[-1] - tries[-2] > tries[1] - tries[0]


def test_drafts_from_the_text_follow_its_longest_repeated_ending():
    text = np.array([1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 7, 1, 2, 3, 4], np.int32)
    assert text_drafts(text, 3).tolist() == [5, 9, 2]
    assert text_drafts(text[:-1], 8).tolist() == [4, 5, 9, 2, 3, 4, 6, 7]
    assert text_drafts(text[:14], 12).tolist() == [4, 5, 9, 2, 3, 4, 6, 7, 1, 2, 3, 4]
    assert text_drafts(np.arange(50, dtype=np.int32), 4).size == 0
    assert text_drafts(np.zeros(0, np.int32), 4).size == 0
    assert text_drafts(np.array([7, 8, 9] * 4, np.int32), 5).tolist() == [7, 8, 9, 7, 8]


# --- the tool that measures it ---


def test_identity_and_speed_are_measured_prompt_by_prompt(tmp_path, capsys, monkeypatch):
    model, data = tmp_path / "tiny.gguf", tmp_path / "texts.jsonl"
    make_tiny_model(model, "llama", "Q8_0")
    write_texts(data, "text")
    argv = f"measure_exact {model} --data {data} --prompts 3 --length 12 --tokens 20 --threads 1"
    monkeypatch.setattr(sys, "argv", argv.split())
    measure_exact.main()
    cells = [c.strip() for c in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    assert cells[0] == "3 of 3" and float(cells[1]) > 0 and 0 < float(cells[3]) <= 1e3
    monkeypatch.setattr(sys, "argv", [*argv.split(), "--drafts", "3", "--beta", "1"])
    measure_exact.main()
    cells = [c.strip() for c in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    # Drafts of all neurons come true; of the fifth verification two were asked for.
    assert (cells[0], cells[5]) == ("3 of 3", "3.80")
    text = tmp_path / "text.txt"
    text.write_text("the river rose high in the night " * 9)
    monkeypatch.setattr(sys, "argv", argv.replace(str(data), str(text)).split())
    measure_exact.main()
    assert "| 3 of 3 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*argv.split(), "--skip", "2"])
    measure_exact.main()
    assert "| 2 of 2 |" in capsys.readouterr().out  # only four of the texts are long enough
    monkeypatch.setattr(sys, "argv", [*argv.split(), "--skip", "99"])
    with pytest.raises(SystemExit, match="--skip 99 leaves no prompt"):
        measure_exact.main()
    seconds = iter([2.0, 1.0, 4.0, 4.0, 8.0, 1.0])  # of three pairs, every other one exact first

    def fake(llm, core, *_):
        return Answer([core.beta], next(seconds))

    monkeypatch.setattr(measure_exact, "answer", fake)
    argv += " --beta 0.3"
    monkeypatch.setattr(sys, "argv", argv.split())
    with pytest.raises(SystemExit, match="gave different ids"):
        measure_exact.main()
    assert "| 0 of 3 | 2.333 | 2.000 | 1.000 | none made | – |" in capsys.readouterr().out
