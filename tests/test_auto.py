"""core="auto" keeps its promise, and tuning measures what it goes by."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest

import measure_auto
from coreinfer import CoreConfig, Llama, _core
from coreinfer.auto import Auto
from coreinfer.cli import main
from coreinfer.tuning import (
    FORMAT_VERSION,
    Row,
    Tuning,
    cut,
    divergence,
    find_tuning,
    gain,
    measure,
    tuning_path,
)
from make_synthetic_model import make_paper_model, make_tiny_model
from small_clusters import make_clusters, write_texts
from synthetic_shapes import PAPER


def row(beta: float, n_prompt: int, kl: float, speed: float = 1.5, **rest) -> Row:
    figures = {"kl_error": 0.0, "agreement": 0.9, "stability": 0.5, "weight_share": 0.7} | rest
    return Row(CoreConfig(beta=beta), n_prompt, kl, speed=speed, **figures)


# --- choosing ---


def test_the_fastest_setting_within_the_allowance_is_chosen():
    tuning = Tuning(1, (row(0.8, 64, 0.01, 1.2), row(0.4, 64, 0.04, 1.6), row(0.2, 64, 0.2, 2.0)))
    assert tuning.choose(0.05).config.beta == 0.4
    assert tuning.choose(0.02).config.beta == 0.8
    assert tuning.choose(0.3).config.beta == 0.2
    assert tuning.choose(0.001) is None


def test_a_setting_counts_from_the_length_on_at_which_all_longer_ones_pass():
    rows = (row(0.4, 64, 0.01), row(0.4, 128, 0.2), row(0.4, 256, 0.04), row(0.4, 512, 0.03))
    assert Tuning(1, rows).choose(0.05).n_prompt == 256
    assert Tuning(1, rows[:2]).choose(0.05) is None


def test_the_uncertainty_of_a_measurement_counts():
    assert Tuning(1, (row(0.4, 64, 0.04, kl_error=0.02),)).choose(0.05) is None


def test_a_setting_slower_than_dense_is_never_chosen():
    assert Tuning(1, (row(0.4, 64, 0.0, speed=0.98),)).choose(0.05) is None


def begun(start: int, beta: float, speed: float, **rest) -> Row:
    """A row of a setting that begins dense, within KL 0.05."""
    made = row(beta, 64, 0.03, speed, **rest)
    return replace(made, config=replace(made.config, start=start))


def test_what_a_setting_gains_counts_its_dense_beginning_and_the_choice():
    assert gain(row(0.4, 64, 0.03, 2.0), 101) == 2.0
    assert gain(row(0.4, 64, 0.03, 2.0, choosing=50.0), 101) == 1.0
    # Of 100 tokens 20 are dense, 80 take half the time, and choosing takes that of 10.
    assert gain(begun(20, 0.2, 2.0, choosing=10.0), 101) == pytest.approx(100 / (20 + 10 + 40))
    assert gain(begun(20, 0.2, 2.0, choosing=10.0), 21) == 1.0  # it ends before the choice


def test_the_fastest_setting_is_the_fastest_for_an_answer_of_that_length():
    tuning = Tuning(1, (row(0.6, 64, 0.03, 1.2, choosing=4.0), begun(32, 0.2, 1.6, choosing=8.0)))
    starts = {n: tuning.choose(0.05, n_answer=n).config.start for n in (40, 60, 256)}
    assert starts == {40: 0, 60: 0, 256: 32}
    assert tuning.choose(0.05) == tuning.choose(0.05, n_answer=256)
    assert tuning.choose(0.05, n_answer=20) is None  # choosing takes more than it gains
    # So auto does, and takes no answer for longer than that.
    tuning = replace(tuning, rows=(*tuning.rows, begun(200, 0.1, 3.0)))
    auto = Auto(CoreConfig(mode="auto"), tuning, ffn_resident=True)
    chosen = {}
    for most in (None, 20, 40, 256, 10**9):
        auto.begin(n_answer=most)
        chosen[most] = auto.decide(100, 0, 0.9, never).config
    assert {n: c.start for n, c in chosen.items() if c.mode == "stable"} == {
        None: 32,
        40: 0,
        256: 32,
        10**9: 32,
    }
    assert chosen[20].mode == "exact"


def test_a_setting_serves_answers_drawn_at_no_more_than_it_was_measured_with():
    rows = (row(0.2, 64, 0.03, 2.0, temperature=0.0), row(0.6, 64, 0.03, 1.2, temperature=0.8))
    rows += (row(0.2, 64, 0.3, 2.0, temperature=0.8),)
    auto = Auto(CoreConfig(mode="auto"), Tuning(1, rows), ffn_resident=True)
    shares = {}
    for temperature in (0.0, 0.2, 0.8, 0.9):
        auto.begin(temperature=temperature)
        decision = auto.decide(100, 0, 0.9, never)
        shares[temperature] = decision.config.beta if decision.config.mode == "stable" else None
    assert shares == {0.0: 0.2, 0.2: 0.6, 0.8: 0.6, 0.9: None}
    assert decision.reason == (
        "nothing measured is within KL 0.05 and faster for an answer of 256 tokens at temperature "
        "0.9"
    )
    assert Tuning(1, rows).choose(0.05).config.beta == 0.6
    limited = decide(Tuning(1, rows), resident=False)
    assert limited.config.beta == 0.6
    assert Tuning(1, rows).known(CoreConfig(beta=0.2), 100) == 0.3


@pytest.mark.parametrize("tuned", [(0.2,), (0.2, 0.3), (0.2, 0.9), ()], ids=str)
def test_exact_drafts_need_no_more_neurons_than_some_setting_that_memory_is_planned_for(tuned):
    tuning = Tuning(1, tuple(row(beta, 64, 0.03, choosing=4.0) for beta in tuned))
    auto = Auto(CoreConfig(mode="auto", max_drafts=3), tuning, ffn_resident=True)
    planned = max(setting.share for setting in auto.settings)
    assert planned == max(tuned, default=CoreConfig.beta)
    for n_answer, temperature, n_tokens in [(None, 0.8, 32), (4, 0.8, 100), (None, 0.9, 100)]:
        auto.begin(n_answer, temperature)
        exact = auto.decide(n_tokens, 0, 0.9, never).config
        assert exact.mode == "exact" and exact.share <= planned
        assert exact.max_drafts == 3  # as the user said


def test_auto_goes_by_the_temperature_of_an_answer(tiny):
    with Llama(str(tiny), verbose=False, core="off") as llm:
        tuned = row(0.4, 8, 0.01, stability=0.0, temperature=0.3)
        tuning = Tuning(llm.fingerprint, (tuned,))
    with Llama(str(tiny), verbose=False, tuning=tuning) as llm:
        for temperature, mode in ((0.0, "stable"), (0.3, "stable"), (0.4, "exact")):
            llm("ab" * 20, max_tokens=3, temperature=temperature)
            assert llm.decision.config.mode == mode
            llm.score(llm.prompt_ids("ab" * 20), [1, 2], temperature=temperature)
            assert llm.decision.config.mode == mode


def test_nothing_begins_dense_where_the_dense_weights_do_not_stay():
    fast = begun(32, 0.2, 3.0)
    slow = row(0.6, 64, 0.03, 1.2, choosing=1000.0)  # there is no dense decoding to compare with
    assert decide(Tuning(1, (fast, slow)), resident=False).config == slow.config
    alone = decide(Tuning(1, (fast,)), resident=False)
    assert alone.config.start == 0 and alone.kl is None


def test_without_the_dense_weights_a_temperature_above_all_measured_takes_what_the_highest_does():
    rows = (row(0.2, 64, 0.03, 2.0, temperature=0.0), row(0.6, 64, 0.03, 1.2, temperature=0.8))
    auto = Auto(CoreConfig(mode="auto"), Tuning(1, rows), ffn_resident=False)
    assert sorted(setting.beta for setting in auto.settings) == [0.2, 0.6]
    auto.begin(temperature=0.9)
    decision = auto.decide(100, 0, 0.9, never)
    assert decision.config.beta == 0.6 and decision.kl is None
    assert decision.reason.endswith("not known: temperature 0.9, measured up to 0.8")


def test_a_dense_beginning_s_stability_is_that_of_the_text_that_chooses():
    tuning = Tuning(1, (begun(32, 0.2, 2.0, stability=0.5),))
    waiting = decide(tuning, stability=0.1)
    assert waiting.config == tuning.rows[0].config and waiting.until is None
    assert waiting.reason == "measured within KL 0.05 after 32 dense tokens"
    assert decide(tuning, stability=0.6, n_answered=32).config == waiting.config
    unlike = decide(tuning, stability=0.1, n_answered=32)
    assert unlike.config.mode == "exact" and unlike.until == 132
    assert decide(tuning, n_tokens=20, stability=0.1).until == 64


class SomeClusters:
    digest = "c1"


def never() -> float:
    raise AssertionError("the prompt's cluster was looked up")


def decide(
    tuning,
    n_tokens=100,
    stability=0.9,
    resident=True,
    clusters=None,
    similarity=never,
    n_answered=0,
    **core,
):
    auto = Auto(CoreConfig(mode="auto", **core), tuning, ffn_resident=resident, clusters=clusters)
    return auto.decide(n_tokens, n_answered, stability, similarity)


def test_a_patch_learns_from_clusters_only_as_it_was_measured_to():
    alone = row(0.6, 64, 0.03)
    learned = row(0.4, 64, 0.03, clusters="c1")
    others = row(0.2, 64, 0.03, clusters="c2")
    both = Tuning(1, (alone, learned, others))
    assert decide(both).config == CoreConfig(beta=0.6)
    assert decide(both, clusters=SomeClusters()).config == CoreConfig(beta=0.4)
    only = Tuning(1, (alone, others))
    assert decide(only, clusters=SomeClusters()).config == CoreConfig(beta=0.6, prior=False)


def test_without_a_table_decoding_is_exact():
    decision = decide(None)
    assert decision.config.mode == "exact" and decision.kl == 0.0 and decision.until is None


def test_a_long_and_stable_prompt_decodes_with_the_measured_setting():
    decision = decide(Tuning(1, (row(0.4, 64, 0.03),)))
    assert decision.config == CoreConfig(beta=0.4) and decision.kl == 0.03


def test_a_short_prompt_is_exact_until_it_is_long_enough():
    decision = decide(Tuning(1, (row(0.4, 64, 0.03),)), n_tokens=20)
    assert decision.config.mode == "exact" and decision.until == 64


@pytest.mark.parametrize("stability", [None, 0.4])
def test_an_unstable_prompt_is_exact_for_a_while(stability):
    decision = decide(Tuning(1, (row(0.4, 64, 0.03),)), stability=stability)
    assert decision.config.mode == "exact" and decision.until == 132


def test_a_limit_that_keeps_dense_weights_out_decides_at_once_and_says_what_is_known():
    unknown = decide(None, n_tokens=3, resident=False)
    assert unknown.config.mode == "stable" and unknown.kl is None and unknown.until is None
    assert "not known" in unknown.reason
    tuning = Tuning(1, (row(0.6, 64, 0.03, stability=0.5),))
    known = decide(tuning, stability=0.6, resident=False)
    assert known.config == CoreConfig(beta=0.6) and known.kl == 0.03 and known.stability == 0.6


@pytest.mark.parametrize(
    ("n_tokens", "stability", "why"),
    [
        (3, 0.9, "3 tokens; measured within KL 0.05 from 64 on"),
        (100, 0.1, "stability 0.10, measured from 0.50 on"),
        (100, None, "stability 0.00, measured from 0.50 on"),
    ],
)
def test_under_a_limit_nothing_is_claimed_of_a_text_unlike_those_measured(n_tokens, stability, why):
    tuning = Tuning(1, (row(0.6, 64, 0.03, stability=0.5),))
    decision = decide(tuning, n_tokens=n_tokens, stability=stability, resident=False)
    assert decision.config == CoreConfig(beta=0.6) and decision.kl is None
    assert "not known" in decision.reason and why in decision.reason


def test_under_a_limit_a_setting_that_measured_worse_says_so():
    rows = (row(0.4, 64, 0.16), row(0.4, 256, 0.12), row(0.6, 64, 0.07))
    decision = decide(Tuning(1, rows), resident=False)
    assert decision.config.beta == 0.4 and decision.kl == 0.16
    assert "measured KL 0.16, more than the allowed 0.05" in decision.reason
    assert decide(Tuning(1, rows), n_tokens=300, resident=False).kl == 0.12
    assert decide(Tuning(1, rows), n_tokens=30, resident=False).kl is None


GAMMA = CoreConfig(mode="similar", gamma=0.9)


def cluster_row(n_prompt: int, kl: float, speed=1.5, clusters="c1", similarity=0.5) -> Row:
    made = row(0.4, n_prompt, kl, speed)
    return replace(made, config=GAMMA, clusters=clusters, cluster_similarity=similarity)


OWN_AND_CLUSTERS = Tuning(
    1, (row(0.4, 64, 0.03), cluster_row(16, 0.02), cluster_row(16, 0.01, 9.0, "others"))
)


def near(n_tokens, stability=0.9, resident=True, tuning=OWN_AND_CLUSTERS, similarity=lambda: 0.5):
    return decide(tuning, n_tokens, stability, resident, SomeClusters(), similarity)


def test_clusters_serve_where_the_prompt_s_own_neurons_may_not():
    assert near(100, similarity=never).config.mode == "stable"
    assert near(20).config == GAMMA and near(20).kl == 0.02 and near(20).until is None
    assert near(100, 0.1).config == GAMMA
    assert near(10, similarity=never).config.mode == "exact"
    assert near(10).until == 16  # the cluster's neurons serve before the prompt's own may
    assert near(10, resident=False).config.mode == "stable"
    assert near(10, resident=False).kl is None
    assert near(20, resident=False).config == GAMMA and near(20, resident=False).kl == 0.02
    only_clusters = Tuning(1, OWN_AND_CLUSTERS.rows[1:])
    assert near(100, tuning=only_clusters).config == GAMMA
    assert near(3, resident=False, tuning=only_clusters).config == GAMMA
    assert near(3, tuning=only_clusters).until == 16
    others = Tuning(1, OWN_AND_CLUSTERS.rows[2:])
    assert near(100, tuning=others, similarity=never).config.mode == "exact"


def test_a_prompt_less_like_its_cluster_than_those_measured_is_decoded_without_it():
    far = near(20, similarity=lambda: 0.49)
    assert far.config.mode == "exact" and far.until == 64 and far.kl == 0.0
    assert "cluster similarity 0.49, measured from 0.50 on" in far.reason
    only_clusters = Tuning(1, OWN_AND_CLUSTERS.rows[1:])
    alone = near(20, tuning=only_clusters, similarity=lambda: 0.49)
    assert alone.config.mode == "exact" and alone.until is None
    limited = near(20, resident=False, similarity=lambda: 0.49)
    assert limited.config.mode == "stable" and limited.kl is None
    limited = near(20, resident=False, tuning=only_clusters, similarity=lambda: 0.49)
    assert limited.config == GAMMA and limited.kl is None
    assert "not known: cluster similarity 0.49, measured" in limited.reason


def test_a_choice_by_clusters_is_for_prompts_like_all_that_it_was_measured_with():
    rows = (cluster_row(16, 0.02, similarity=0.7), cluster_row(64, 0.02, similarity=0.4))
    rows += (cluster_row(8, 0.9, similarity=0.1),)
    choice = Tuning(1, rows).choose(0.05, mode="similar", clusters="c1")
    assert choice.n_prompt == 16 and choice.cluster_similarity == 0.4
    assert Tuning(1, (row(0.4, 64, 0.03),)).choose(0.05).cluster_similarity is None


@pytest.mark.parametrize("similarity", [None, 1.1, float("nan"), "0.5", True])
def test_a_row_of_clusters_says_how_near_their_prompts_were(similarity):
    with pytest.raises(ValueError, match="cluster_similarity is .*; expected a number from -1 to"):
        cluster_row(16, 0.02, similarity=similarity)
    with pytest.raises(ValueError, match="cluster_similarity is 0.5; expected None"):
        replace(row(0.4, 16, 0.02), cluster_similarity=0.5)


# --- with a model ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("auto") / "tiny.gguf"
    make_tiny_model(path, "llama", "Q8_0")
    return path


def test_auto_is_the_default_and_writes_the_dense_text(tiny):
    texts = []
    for core in ({}, {"core": "off"}):
        with Llama(str(tiny), verbose=False, seed=3, **core) as llm:
            texts.append(llm("ab" * 30, max_tokens=50, temperature=0.9)["choices"][0]["text"])
            if not core:
                assert llm.core.mode == "auto" and llm.decision.config.mode == "exact"
                assert llm.core_set is None
    assert texts[0] == texts[1]


def test_auto_waits_in_exact_mode_and_then_compacts(tiny):
    with Llama(str(tiny), verbose=False, core="off") as llm:
        fingerprint = llm.fingerprint
        dense = [t for t, _ in zip(llm.generate("ab" * 8, temp=0), range(60), strict=False)]
    tuning = Tuning(fingerprint, (row(0.9, 48, 0.01, stability=0.0),))
    with Llama(str(tiny), verbose=False, tuning=tuning) as llm:
        n_prompt = len(llm.prompt_ids("ab" * 8))
        taken = []
        for token in llm.generate("ab" * 8, temp=0):
            taken.append(token)
            if len(taken) == 60:
                break
        assert llm.decision.config.mode == "stable" and llm.core_set.beta == 0.9
        assert llm.core_set.n_tokens == 48
        assert llm._session.n_dense == 48
        n_exact = 48 - n_prompt + 1  # one more is drawn from the last exact logits
        assert n_exact > 10 and taken[:n_exact] == dense[:n_exact]


def first(llm: Llama, n: int, **options) -> list[int]:
    return [t for t, _ in zip(llm.generate("ab" * 20, temp=0, **options), range(n), strict=False)]


# A second answer to a prompt reads its last token alone, the first one all in one batch: only in
# float32 do both round alike on every instruction set.
FLOAT32 = {"f32_activations": True, "verbose": False}


def test_auto_begins_dense_and_then_decodes_as_that_setting_does(tiny):
    tuned = begun(6, 0.3, 2.0, stability=0.0)
    with Llama(str(tiny), **FLOAT32, core="off") as llm:
        tuning = Tuning(llm.fingerprint, (replace(tuned, n_prompt=8),))
        dense = first(llm, 40)
        llm.core = tuned.config
        expected, neurons = first(llm, 40), llm.core_set
    with Llama(str(tiny), **FLOAT32, tuning=tuning) as llm:
        assert first(llm, 5) == dense[:5] and llm.core_set is None
        assert first(llm, 40) == expected != dense
        assert llm.decision.config == tuned.config and llm.core_set.same_neurons(neurons)
        # Three tokens end before any is chosen, so that exact mode may as well draft.
        llm("ab" * 20, max_tokens=3, temperature=0)
        assert llm.decision.config.mode == "exact"


def test_auto_does_without_neurons_that_a_dense_beginning_left_unstable(tiny):
    with Llama(str(tiny), **FLOAT32, core="off") as llm:
        fast = replace(begun(6, 0.3, 2.0, stability=1.0), n_prompt=8)
        tuning = Tuning(llm.fingerprint, (fast,))
        dense = first(llm, 30)
    with Llama(str(tiny), **FLOAT32, tuning=tuning) as llm:
        assert first(llm, 5) == dense[:5] and llm.decision.config.mode == "stable"
        assert first(llm, 30) == dense and llm.decision.config.mode == "exact"


def test_a_tuning_of_another_model_or_a_damaged_one_is_refused_whoever_gives_it(tiny, tmp_path):
    path = tmp_path / "t.json"
    other = Tuning(1, (row(0.9, 48, 0.01, stability=0.0),))
    other.save(path)
    for given, where in ((other, "^"), (path, f"^{path}: "), (str(path), f"^{path}: ")):
        error = (
            f"{where}the tuning file belongs to another model file or activation; run `coreinfer"
        )
        with pytest.raises(ValueError, match=error):
            Llama(str(tiny), verbose=False, tuning=given)
        with Llama(str(tiny), verbose=False, tuning=given, core="stable") as llm:  # has no use
            with pytest.raises(ValueError, match="belongs to another model file"):
                llm.core = "auto"
            assert llm.core.mode == "stable" and llm("ab" * 9, max_tokens=2)["choices"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"t\.json: not a valid tuning file: "):
        Llama(str(tiny), verbose=False, tuning=path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layers": (0, 99)}, "layers is '0:99'; expected 0 <= first < last <= 3"),
        ({"beta": 1e-4}, "beta is 0.0001, which is less than one of a layer's 512 neurons"),
    ],
)
def test_a_tuned_setting_that_is_none_of_this_model_is_refused_at_once(tiny, setting, message):
    with Llama(str(tiny), verbose=False, core="off") as llm:
        rows = (replace(row(0.9, 48, 0.01), config=CoreConfig(**setting)),)
        tuning = Tuning(llm.fingerprint, rows)
    with pytest.raises(ValueError, match=message):
        Llama(str(tiny), verbose=False, tuning=tuning)


def test_auto_under_a_memory_limit_warns_that_nothing_is_known(tiny, monkeypatch):
    from coreinfer import core_choice

    made = core_choice.Auto
    monkeypatch.setattr(
        core_choice, "Auto", lambda core, tuning, **_: made(core, tuning, ffn_resident=False)
    )
    with Llama(str(tiny), verbose=False) as llm:
        with pytest.warns(UserWarning, match="not known") as caught:
            llm("ab" * 30, max_tokens=4)
        assert [warning.filename for warning in caught] == [__file__]
        assert llm.core_set is not None
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            llm("ab" * 31, max_tokens=4)


def test_auto_under_a_memory_limit_warns_of_what_measured_worse_than_asked(tiny, monkeypatch):
    from coreinfer import core_choice

    made = core_choice.Auto
    monkeypatch.setattr(
        core_choice, "Auto", lambda core, tuning, **_: made(core, tuning, ffn_resident=False)
    )
    with Llama(str(tiny), verbose=False, core="off") as llm:
        tuning = Tuning(llm.fingerprint, (row(0.4, 8, 0.16),))
    with Llama(str(tiny), verbose=False, tuning=tuning) as llm:
        ways = [
            lambda: llm("ab" * 30, max_tokens=4),
            lambda: list(llm("ab" * 30, max_tokens=4, stream=True)),
            lambda: next(llm.generate("ab" * 30)),
            lambda: llm.score(llm.prompt_ids("ab" * 30), [1]),
        ]
        for way in ways:
            llm.reset()
            with pytest.warns(UserWarning, match="more than the allowed 0.05") as caught:
                way()
            assert [warning.filename for warning in caught] == [__file__]
            assert llm.decision.kl == 0.16


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """150 MiB of FFN weights in 6 layers, and little else."""
    path = tmp_path_factory.mktemp("auto") / "wide.gguf"
    shape = replace(
        PAPER["llama2-7b"], n_layer=6, n_embd=1024, n_ff=8192, n_head=8, n_head_kv=2, n_vocab=2048
    )
    make_paper_model(path, shape, "Q8_0")
    return path


def test_exact_under_a_memory_limit_says_what_to_do(wide):
    engine = _core.Engine(str(wide), memory_limit=_core.memory()["rss"] + (140 << 20))
    assert not engine.ffn_resident
    session = _core.Session(engine, n_ctx=64, n_batch=8)
    with pytest.raises(RuntimeError, match="memory_limit does not hold: raise it"):
        session.set_exact()


# --- measuring and filing ---


def test_prompts_are_spread_over_the_text():
    ids = np.arange(100, dtype=np.int32)
    assert [c[0] for c in cut(ids, 10, 4)] == [0, 30, 60, 90]
    assert len(cut(ids, 60, 4)) == 1
    with pytest.raises(ValueError, match="100 tokens; expected at least 101"):
        cut(ids, 101, 1)


def test_all_neurons_cost_nothing_and_few_cost_much(tiny):
    ids = np.random.default_rng(0).integers(0, 320, 400, dtype=np.int32)
    # Batches of 16: how much of a prompt is read again changes no bit.
    with Llama(str(tiny), verbose=False, core="off", n_batch=16) as llm:
        configs = [CoreConfig(beta=1.0), CoreConfig(beta=0.1)]
        rows = list(measure(llm, ids, configs, n_prompts=(64, 5000), n_texts=3, n_answer=12))
    full, few = rows
    assert full.n_prompt == few.n_prompt == 64
    assert full.kl == pytest.approx(0.0, abs=1e-9) and full.agreement == 1.0
    assert few.kl > 1e-4 and few.weight_share < full.weight_share == 1.0


def test_a_dense_beginning_is_measured_by_what_comes_after_it(tiny):
    ids = np.random.default_rng(0).integers(0, 320, 64, dtype=np.int32)
    config = CoreConfig(beta=0.1, start=5)
    with Llama(str(tiny), verbose=False, core="off", n_batch=16) as llm:
        asked = {"n_prompts": (64,), "n_texts": 1, "n_answer": 4, "temperatures": [0.0]}
        (found,) = measure(llm, ids, [config], **asked)
        answer = [t for t, _ in zip(llm.generate(ids, temp=0), range(9), strict=False)]
        llm.core = "off"
        dense = llm.score(ids, answer)
        llm.core = config
        kl = divergence(dense, llm.score(ids, answer))
        assert kl[:6].max() < 1e-9 < 1e-4 < kl[6:].min()
        assert found.kl == pytest.approx(kl[6:].mean(), rel=0.2)  # batches differ
        assert found.stability == llm.core_set.stability
    assert found.weight_share < 0.9 and found.choosing > 0.0


def test_answers_are_drawn_at_the_temperature_that_was_asked_for(tiny, monkeypatch):
    drawn = []
    generate = Llama.generate_ids

    def spy(self, prompt, sampling, *rest, **more):
        drawn.append((sampling.temperature, more["seed"]))
        return generate(self, prompt, sampling, *rest, **more)

    monkeypatch.setattr(Llama, "generate_ids", spy)
    ids = np.random.default_rng(0).integers(0, 320, 64, dtype=np.int32)
    with Llama(str(tiny), verbose=False) as llm:
        asked = {"n_prompts": (8,), "n_texts": 2, "n_answer": 2}
        (row,) = measure(llm, ids, [CoreConfig()], **asked)
        rows = list(measure(llm, ids, [CoreConfig()], **asked, temperatures=(0.3, 0.0)))
    assert [r.temperature for r in (row, *rows)] == [0.8, 0.3, 0.0]
    # A prompt's answers are drawn alike, dense and by core neurons.
    assert drawn == [(t, seed) for t in (0.8, 0.3, 0.0) for seed in (0, 0, 1, 1)]


def test_a_tuning_file_of_the_version_before_is_still_read(tmp_path):
    path = tmp_path / "t.json"
    rows = [row(beta, 64, 0.04, temperature=0.0) for beta in (0.4, 0.2)]
    tuning = Tuning(1, tuple(rows))
    tuning.save(path)
    document = json.loads(path.read_text())
    assert document["version"] == 4
    document["version"] = 3
    for entry in document["rows"]:
        del entry["start"], entry["choosing"], entry["temperature"]
        entry["blend"] = 0.25  # a default of that day, which a stable setting does not look at
    path.write_text(json.dumps(document))
    assert Tuning.load(path) == tuning
    document["version"] = 4
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="'start' is missing"):
        Tuning.load(path)


def test_a_tuning_file_round_trips_and_is_found_beside_the_model(tiny, tmp_path):
    clusters = cluster_row(64, 0.1, clusters="ab12", similarity=-0.25)
    tuning = Tuning(77, (row(0.4, 64, 0.04), begun(8, 0.2, 1.5, choosing=3.0), clusters))
    model = tmp_path / "model.gguf"
    tuning.save(tuning_path(model))
    assert find_tuning(model, 77) == tuning
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf.tuning.json"]
    with pytest.raises(ValueError, match="belongs to another model file"):
        find_tuning(model, 78)


def test_a_full_disk_leaves_the_old_tuning_file_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    Tuning(1, (row(0.4, 64, 0.04),)).save(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot save the tuning file: No space left.*unchanged"):
        Tuning(1, ()).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["t.json"]


def test_files_beside_a_model_are_as_readable_as_the_umask_allows(tmp_path):
    old = os.umask(0o027)
    try:
        Tuning(1, ()).save(tmp_path / "t.json")
        make_clusters().save(tmp_path / "c.npz")
    finally:
        os.umask(old)
    assert [p.stat().st_mode & 0o777 for p in tmp_path.iterdir()] == [0o640, 0o640]


def test_a_tuning_file_that_may_not_be_read_is_passed_over_with_a_warning(
    tiny, tmp_path, monkeypatch
):
    model = tmp_path / "model.gguf"
    shutil.copy(tiny, model)
    Tuning(1, (row(0.4, 64, 0.04),)).save(tuning_path(model))

    def refused(*_):  # tests may run as root, whom no mode refuses
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("coreinfer.sidecar.open", refused, raising=False)
    with pytest.warns(UserWarning, match=r"tuning\.json: .* not used: Permission denied") as caught:
        llm = Llama(str(model), verbose=False)
    assert [warning.filename for warning in caught] == [__file__]
    with llm:
        llm("ab", max_tokens=1)
        assert llm.decision.config.mode == "exact"


def document(**fields) -> bytes:
    return json.dumps({"format": "coreinfer tuning", "fingerprint": "1"} | fields).encode()


DAMAGES = {
    "not json": (b"{", "Expecting property name"),
    "bytes": (b"\xff\xfe\x00", "can't decode byte 0xff"),
    "another format": (b'{"format": "x"}', "does not say 'coreinfer tuning'"),
    "another version": (document(version=9), "version 9; this build reads"),
    "no rows": (document(version=FORMAT_VERSION), "'rows' is missing"),
    "rows by name": (document(version=FORMAT_VERSION, rows={}), "rows is not a list"),
    "too much": (b" " * (1 << 24) + b"{}", "it has more than 16777216 bytes"),
    "rows of numbers": (document(version=FORMAT_VERSION, rows=[3]), "a row is 3; expected an obj"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_tuning_file_is_a_clear_error(name, tmp_path):
    path = tmp_path / "t.json"
    data, reason = DAMAGES[name]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"t\.json: not a valid tuning file: .*{reason}"):
        Tuning.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kl", float("nan")), ("kl", "0"), ("beta", 2.0), ("speed", -1), ("n_prompt", None)]
    + [("start", -1), ("choosing", -1), ("temperature", None)]
    + [("mode", "exact"), ("clusters", 1), ("patch", 4096), ("cluster_similarity", 0.5)],
)
def test_a_value_out_of_range_is_a_clear_error(field, value, tmp_path):
    path = tmp_path / "t.json"
    Tuning(1, (row(0.4, 64, 0.04),)).save(path)
    document = json.loads(path.read_text())
    document["rows"][0][field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"not a valid tuning file: {field} is "):
        Tuning.load(path)


def test_tune_writes_what_auto_goes_by(tmp_path, capsys):
    model = tmp_path / "tiny.gguf"
    make_tiny_model(model, "llama", "Q8_0")
    text = tmp_path / "text.txt"
    text.write_text("some words of a text that repeats " * 30)
    small = ["--prompts", "32,48", "--texts", "2", "-n", "6", "--betas", "0.5,0.9"]
    small += ["--first-layers", "1,2"]
    assert main(["tune", str(model), "--text", str(text), *small]) == 0
    out, err = capsys.readouterr()
    assert (
        out.count("\n") == 2 + 8 and "| 48 | 0.8 | flock | off | all | × 2 | 64 | 0 | 0.9 |" in out
    )
    assert "wrote" in err
    assert len(Tuning.load(tuning_path(model)).rows) == 8
    with Llama(str(model), verbose=False) as llm:
        llm("ab", max_tokens=1)
        assert llm.decision.reason != "no tuning file"


def test_tune_opens_the_model_with_the_limit_of_gpu_memory_that_was_given(
    tiny, tmp_path, monkeypatch
):
    asked = {}

    class Opened(Exception):
        pass

    def opened(path, **options):
        asked.update(options)
        raise Opened

    monkeypatch.setattr("coreinfer.llama.Llama", opened)
    text = tmp_path / "text.txt"
    text.write_text("some words")
    given = ["--gpu-layers", "-1", "--main-gpu", "1", "--vram-limit", "3GiB"]
    with pytest.raises(Opened):
        main(["tune", str(tiny), "--text", str(text), *given])
    assert (asked["n_gpu_layers"], asked["main_gpu"], asked["vram_limit"]) == (-1, 1, 3 << 30)


def test_tune_of_a_text_that_is_too_short_says_so_and_writes_nothing(tiny, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("short")
    assert main(["tune", str(tiny), "--text", str(text)]) == 1
    assert "expected at least 64 for one prompt" in capsys.readouterr().err
    assert not tuning_path(tiny).exists()


def test_what_auto_costs_is_measured_on_other_texts(tmp_path, capsys, monkeypatch):
    model, data = tmp_path / "tiny.gguf", tmp_path / "texts.jsonl"
    make_tiny_model(model, "llama", "Q8_0")
    write_texts(data, "text")
    argv = f"measure_auto {model} --data {data} --lengths 8 14 --prompts 2 --tokens 6"
    monkeypatch.setattr(sys, "argv", [*argv.split(), "--max-kl", "0.05", "0.001"])
    with pytest.raises(SystemExit, match="run `coreinfer tune` first"):
        measure_auto.main()
    with Llama(str(model), verbose=False) as llm:
        Tuning(llm.fingerprint, (row(0.1, 12, 0.03, stability=-1.0),)).save(tuning_path(model))
    measure_auto.main()
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[4:]]
    cells = [cell.strip() for line in table for cell in line]
    assert cells[:3] == ["8", "0.000 ± 0.000, 0 of 2", "0.000 ± 0.000, 0 of 2"]
    assert cells[3] == "14" and cells[5] == "0.000 ± 0.000, 0 of 2"
    assert cells[4].endswith("2 of 2") and float(cells[4].split()[0]) > 0.001
