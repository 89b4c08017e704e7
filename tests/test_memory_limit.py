"""A memory limit: residents stay under it, results stay the same, refusals say what is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import gguf_stream
import make_synthetic_model
from coreinfer import CoreConfig, Llama, _core
from coreinfer.tuning import Row, Tuning
from make_synthetic_model import make_paper_model
from small_clusters import make_clusters
from synthetic_shapes import PAPER

MIB = 1 << 20
# In a process of its own: the peak of this one has been reached by other tests.
RUN = """
import json, sys
import numpy as np
from coreinfer import _core
path, limit = sys.argv[1], int(sys.argv[2])
before = _core.memory()["rss"]
engine = _core.Engine(path, memory_limit=limit, core_share=0.2)
session = _core.Session(engine, n_ctx=256, n_batch=64)
tokens = np.arange(100, 200, dtype=np.int32)
session.prefill(tokens, statistic="flock")
session.set_core(session.select(beta=0.2))
scores = session.score(tokens[:5])
print(json.dumps({
    "before": before, "peak": _core.memory()["peak_rss"], "rss": _core.memory()["rss"],
    "resident": engine.ffn_resident, "logits": session.logits()[:50].tolist(),
    "weights": engine.weight_bytes, "ffn": engine.ffn_bytes,
}))
"""


WIDE = replace(
    PAPER["llama2-7b"], n_layer=6, n_embd=1024, n_ff=8192, n_head=8, n_head_kv=2, n_vocab=2048
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """150 MiB of FFN weights in 6 layers, and little else."""
    path = tmp_path_factory.mktemp("limit") / "wide.gguf"
    make_paper_model(path, WIDE, "Q8_0")
    return str(path)


def run(model: str, limit: int) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", RUN, model, str(limit)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_peak_memory_stays_under_the_limit_and_nothing_changes(model):
    free = run(model, 0)
    limit = free["before"] + 140 * MIB
    limited = run(model, limit)
    assert free["resident"] and not limited["resident"]
    assert limited["peak"] <= limit
    assert limited["rss"] < limited["peak"]
    assert limited["logits"] == free["logits"]


LOAD = """
import sys
from coreinfer import _core
before = _core.memory()["rss"]
engine = _core.Engine(sys.argv[1])
print(_core.memory()["rss"] - before)
"""


@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q5_K", "Q6_K", "F16"])
def test_a_loaded_model_holds_little_more_than_its_file(tmp_path, dtype):
    """Pages of the file are let go once their matrices are repacked."""
    path = tmp_path / "model.gguf"
    shape = replace(PAPER["llama2-7b"], n_layer=2, n_embd=1024, n_ff=8192, n_head=8, n_vocab=4096)
    make_paper_model(path, replace(shape, n_head_kv=2), dtype)
    program = [sys.executable, "-c", LOAD, str(path)]
    held = int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    # Of code and working memory a few MiB come on top, which are not the model's.
    assert 0.9 * path.stat().st_size < held < 1.1 * path.stat().st_size + 4 * MIB


def test_a_new_prompt_under_a_limit_gets_its_own_neurons(model):
    """The dense weights that were dropped are read again for them."""
    prompts = [np.arange(first, first + 40, dtype=np.int32) for first in (100, 900)]
    engines = (_core.Engine(model), small_limit(model))
    sessions = [_core.Session(engine, n_ctx=64, n_batch=16) for engine in engines]
    chosen = []
    for tokens in prompts:
        scores = []
        for session in sessions:
            session.reset()
            session.prefill(tokens, statistic="flock", beta=0.1)
            session.set_core(session.select(beta=0.1))
            scores.append(session.score(tokens[:5]))
        np.testing.assert_array_equal(*scores)
        chosen.append(sessions[1].core_set)
    assert not chosen[0].same_neurons(chosen[1])


def test_the_command_line_keeps_to_a_limit_and_says_the_same(model):
    def run_command(*limit: str) -> subprocess.CompletedProcess[str]:
        argv = ["run", model, "-p", "word " * 20, "--raw", "-n", "4", "--temp", "0", "--json"]
        core = ["--core", "stable", "--beta", "0.1", "--patch", "off", "--ctx", "128"]
        command = [sys.executable, "-m", "coreinfer", *argv, *core, *limit]
        return subprocess.run(command, capture_output=True, text=True)

    refused = run_command("--memory-limit", "1MiB")
    needed = re.search(r"but (\d+) MiB are needed", refused.stderr)
    assert refused.returncode == 1 and not refused.stdout and needed, refused.stderr
    free, limited = run_command(), run_command("--memory-limit", needed[1] + "MiB")
    assert free.returncode == limited.returncode == 0, limited.stderr
    free_facts, facts = json.loads(free.stdout), json.loads(limited.stdout)
    assert facts["text"] == free_facts["text"]
    peaks = [f["timings"]["peak_resident_bytes"] for f in (facts, free_facts)]
    assert peaks[0] <= 1.04 * int(needed[1]) * MIB < peaks[1]


def test_a_limit_that_cannot_be_met_says_what_is_needed(model):
    with pytest.raises(MemoryError, match=r"memory_limit is 1\.0 MiB, but .* MiB are needed"):
        _core.Engine(model, memory_limit=MIB)


def test_a_context_that_does_not_fit_says_what_to_lower(model):
    rss = _core.memory()["rss"]
    engine = _core.Engine(model, memory_limit=rss + 140 * MIB)
    with pytest.raises(MemoryError, match="lower n_ctx or n_batch"):
        _core.Session(engine, n_ctx=100000)
    assert _core.Session(engine, n_ctx=64, n_batch=8).n_ctx == 64


def test_a_core_set_that_does_not_fit_leaves_the_session_usable(model):
    rss = _core.memory()["rss"]
    engine = _core.Engine(model, memory_limit=rss + 140 * MIB)
    session = _core.Session(engine, n_ctx=64, n_batch=16)
    session.prefill(np.arange(16, dtype=np.int32), statistic="flock")
    with pytest.raises(MemoryError, match="lower beta"):
        session.set_core(session.select(beta=0.95))
    session.set_core(session.select(beta=0.1))
    session.decode(3)


def test_dense_decoding_works_a_layer_at_a_time(model):
    rss = _core.memory()["rss"]
    engine = _core.Engine(model, memory_limit=rss + 140 * MIB)
    assert not engine.ffn_resident
    logits = []
    for e in (engine, _core.Engine(model)):
        session = _core.Session(e, n_ctx=64, n_batch=16)
        session.prefill(np.arange(8, dtype=np.int32))
        session.decode(5)
        logits.append(session.logits())
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
    "shape",
    [replace(WIDE, mlp_bias=True), replace(WIDE, arch="phi3")],
    ids=["llama with biases", "phi3"],
)
def test_other_layouts_of_a_layer_come_in_and_are_gathered_alike(tmp_path, shape):
    path = str(tmp_path / "wide.gguf")
    make_paper_model(path, shape, "Q8_0")
    tokens = np.arange(100, 140, dtype=np.int32)
    results = []
    for engine, beta in [(_core.Engine(path), None), (small_limit(path), 0.1)]:
        session = _core.Session(engine, n_ctx=64, n_batch=16)
        session.prefill(tokens, statistic="flock", beta=beta)
        session.decode(5)  # dense
        session.set_core(session.select(beta=0.1))
        results.append((session.logits(), session.score(tokens[:5])))
    for limited, free in zip(results[1], results[0], strict=True):
        np.testing.assert_array_equal(limited, free)


def small_limit(path: str) -> _core.Engine:
    engine = _core.Engine(path, memory_limit=_core.memory()["rss"] + 140 * MIB)
    assert not engine.ffn_resident
    return engine


@pytest.mark.parametrize("layers", [None, (1, 6)], ids=["all", "some"])
def test_core_weights_gathered_in_the_last_batch_are_those_gathered_later(model, layers):
    tokens = np.arange(100, 140, dtype=np.int32)
    results = []
    for engine, beta in [(_core.Engine(model), None), (small_limit(model), 0.1)]:
        session = _core.Session(engine, n_ctx=64, n_batch=16)
        share = {"layers": layers, "first_layer": 3.0}
        session.prefill(tokens, statistic="flock", beta=beta, **share)
        session.set_core(session.select(beta=0.1, **share))
        results.append(session.score(tokens[:5]))
    np.testing.assert_array_equal(*results)


def test_weights_that_passed_by_are_not_read_again(model, tmp_path):
    """With the file gone, only a set that was gathered on the way can still be made."""
    tokens = np.arange(20, dtype=np.int32)
    same, other = {"first_layer": 2.0}, {"first_layer": 1.0}
    for i, (beta, chosen, share, fits) in enumerate(
        [(0.1, 0.1, same, True), (0.1, 0.15, same, False), (0.1, 0.1, other, False)]
        + [(None, 0.1, same, False)]
    ):
        path = tmp_path / f"{i}.gguf"
        shutil.copy(model, path)
        session = _core.Session(small_limit(str(path)), n_ctx=64, n_batch=16)
        session.prefill(tokens, statistic="flock", beta=beta, **same)
        with open(path, "r+b") as file:
            file.truncate(4096)
        core = session.select(beta=chosen, **share)
        if fits:
            session.set_core(core)
            assert session.core_set.same_neurons(core)
        else:
            with pytest.raises(OSError, match="gguf"):
                session.set_core(core)


def test_weights_that_pass_by_are_patched_too(model, tmp_path):
    """While the file is gone, only a set that was gathered on the way can be made and patched."""
    tokens = np.arange(100, 140, dtype=np.int32)
    path = tmp_path / "passing.gguf"
    shutil.copy2(model, path)
    found = []
    for engine, beta in [(_core.Engine(model), None), (small_limit(str(path)), 0.1)]:
        session = _core.Session(engine, n_ctx=64, n_batch=16)
        session.prefill(tokens, statistic="flock", samples=_core.PATCH_SAMPLES, beta=beta)
        if beta is not None:
            with open(path, "r+b") as file:
                file.truncate(4096)
        session.set_core(session.select(beta=0.1))
        session.fit_patch(rank=8)
        if beta is not None:
            with open(model, "rb") as whole, open(path, "r+b") as file:
                shutil.copyfileobj(whole, file)
            shutil.copystat(model, path)  # as if it had never been away
        found.append((session.core_set.patch, session.score(tokens[:5])))
    (kept, free), (passing, limited) = found
    assert len(kept) == len(passing) == 6
    for ours, theirs in zip(passing, kept, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_array_equal(limited, free)
    session.set_core(session.select(beta=0.1))
    assert not np.array_equal(session.score(tokens[:5])[1:], free[1:])  # the patch matters


def test_an_expected_core_that_does_not_fit_is_refused_when_it_is_asked_for(model):
    session = _core.Session(small_limit(model), n_ctx=64, n_batch=16)
    session.prefill(np.arange(16, dtype=np.int32), statistic="flock", beta=0.95)
    with pytest.raises(MemoryError, match="lower beta"):
        session.set_core(session.select(beta=0.95))
    session.decode(3)


# --- the plan knows the session to come ---

SESSION = {"n_ctx": 8192, "n_batch": 64, "type_k": "f32", "type_v": "f32"}
CACHE = 2 * 6 * 8192 * 2 * 128 * 4  # keys and values of 6 layers, 2 heads of 128 each


def test_dense_weights_make_way_for_the_context(model):
    """Where both do not fit, the weights come in a layer at a time instead of a refusal."""
    free = _core.Engine(model)
    limit = _core.memory()["rss"] + free.weight_bytes + CACHE // 2
    alone = _core.Engine(model, memory_limit=limit)
    assert alone.ffn_resident
    with pytest.raises(MemoryError, match="lower n_ctx"):
        _core.Session(alone, **SESSION)
    del alone
    planned = _core.Engine(model, memory_limit=limit, **SESSION)
    assert not planned.ffn_resident
    assert _core.Session(planned, **SESSION).n_ctx == 8192


LLAMA = """
import json, re, sys
from coreinfer import Llama, _core
def run(limit):
    with Llama(sys.argv[1], n_ctx=512, n_batch=64, memory_limit=limit, verbose=False,
               **json.loads(sys.argv[2])) as llm:
        llm("word " * 60, max_tokens=4, temperature=0)
        return llm._engine.ffn_resident, llm.core_set and llm.core_set.patch_rank
try:
    run(1 << 20)
except MemoryError as error:
    needed = re.search(r"but (\\d+) MiB are needed", str(error))[1]
print(json.dumps([int(needed), run(needed + "MiB"), _core.memory()["peak_rss"]]))
"""


@pytest.mark.parametrize(
    ("core", "dense"),
    [
        ({"core": "stable", "beta": 0.2}, False),
        ({}, False),
        ({"core": "stable", "beta": 0.2, "start": 2}, True),
        ({"core": "exact"}, True),
    ],
    ids=["stable", "auto", "start", "exact"],
)
def test_the_limit_that_a_message_asks_for_is_enough_and_is_kept(model, core, dense):
    """The core set that will decode is patched, and its samples are planned with."""
    program = [sys.executable, "-W", "ignore", "-c", LLAMA, model, json.dumps(core)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needed, (resident, patch_rank), peak = json.loads(done.stdout)
    assert resident == dense
    assert patch_rank is None if core.get("core") == "exact" else patch_rank > 0
    assert peak <= 1.04 * needed * MIB  # pages of libraries that are touched later are not planned


def test_an_answer_cannot_begin_dense_where_the_dense_weights_are_not(model):
    limit = _core.memory()["rss"] + 160 * MIB
    given = {"core": "stable", "beta": 0.1, "patch": False, "n_ctx": 64, "n_batch": 16}
    with Llama(model, memory_limit=limit, verbose=False, **given) as llm:
        with pytest.raises(ValueError, match="start is 4, but the memory limit does not hold"):
            llm.core = CoreConfig(start=4)
        assert len(list(zip(range(3), llm.generate("word", temp=0), strict=False))) == 3


@pytest.mark.parametrize(
    ("core", "share"),
    [
        ("off", 0.0),
        (CoreConfig(beta=0.2), 0.2),
        (CoreConfig(mode="similar", gamma=0.1), 0.1),
        (CoreConfig(mode="exact", beta=0.3), 0.3),
    ],
)
def test_a_memory_limit_is_planned_with_the_share_that_will_decode(model, core, share, monkeypatch):
    asked = {}

    def engine(*args, **options):
        asked.update(options)
        raise MemoryError

    monkeypatch.setattr(_core, "Engine", engine)
    with pytest.raises(MemoryError):
        Llama(model, core=core, memory_limit="1GiB", verbose=False)
    assert asked["core_share"] == share


def asked_for(model, monkeypatch, rows: list[Row], **options) -> list[tuple[float, int, bool]]:
    """Share of the neurons, samples, and whether beside the dense weights, of every attempt."""
    tuning = Tuning(_core.GgufFile(os.fsencode(model)).fingerprint, tuple(rows))
    asked = []

    def engine(*args, **given):
        asked.append((given["core_share"], given["samples"], given["dense"]))
        raise MemoryError

    monkeypatch.setattr(_core, "Engine", engine)
    with pytest.raises(MemoryError):
        Llama(model, tuning=tuning, verbose=False, **{"memory_limit": "1GiB", **options})
    return asked


def measured(config: CoreConfig, **rest) -> Row:
    figures = {"kl_error": 0.0, "agreement": 0.9, "stability": 0.5, "weight_share": 0.7}
    return Row(config, 64, 0.01, **{**figures, "speed": 1.5, **rest})


@pytest.mark.parametrize(
    ("tuned", "shares"),
    [
        ([(0.2, 32), (0.6, 0)], [0.6, 0.6]),
        ([(0.9, 32), (0.6, 0)], [0.9, 0.6]),
        ([(0.9, 32)], [0.9, CoreConfig.beta]),  # without the dense weights nothing tuned is left
        ([], [CoreConfig.beta, CoreConfig.beta]),
    ],
)
def test_auto_s_limit_is_planned_with_what_may_decode(model, tuned, shares, monkeypatch):
    """With the dense weights any tuned setting; without them none that begins dense."""
    rows = [measured(CoreConfig(beta=beta, start=start)) for beta, start in tuned]
    dense = _core.EXACT_SAMPLES + (_core.PATCH_SAMPLES if tuned else 0)  # exact until it is stable
    with_dense, without = asked_for(model, monkeypatch, rows)
    assert with_dense == (shares[0], dense, True)
    assert without == (shares[1], _core.PATCH_SAMPLES, False)


@pytest.mark.parametrize(
    ("options", "attempts"),
    [
        ({"n_gpu_layers": 5, "memory_limit": None}, [True]),
        ({"n_gpu_layers": 5}, [True, False]),
        ({"n_gpu_layers": 6, "memory_limit": None}, [True, False]),
        ({"n_gpu_layers": -1, "memory_limit": None}, [True, False]),
    ],
    ids=["a part", "a part, host limited", "all by number", "all"],
)
def test_a_gpu_that_has_a_part_of_the_layers_is_planned_with_all_that_auto_may_take(
    model, monkeypatch, options, attempts
):
    """All dense weights stay there, so auto may begin dense, whatever else was planned."""
    rows = [measured(CoreConfig(beta=0.9, start=32)), measured(CoreConfig(beta=0.2))]
    asked = asked_for(model, monkeypatch, rows, **options)
    assert [dense for _, _, dense in asked] == attempts
    assert asked[0][0] == 0.9


EXACT_AT_FIRST = """
import json, re, sys
from coreinfer import CoreConfig, Llama, _core
from coreinfer.tuning import Row, Tuning
path, options = sys.argv[1], {"n_ctx": 512, "n_batch": 64, "verbose": False}
core = CoreConfig(beta=0.2)
try:
    Llama(path, core=CoreConfig(beta=0.2, start=1), memory_limit=1 << 20, **options)
except MemoryError as error:
    needed = int(re.search(r"but (\\d+) MiB are needed", str(error))[1]) + int(sys.argv[2])
row = Row(core, 400, 0.0, 0.0, 1.0, 0.0, 0.5, speed=2.0)
tuning = Tuning(_core.GgufFile(path).fingerprint, (row,))
with Llama(path, tuning=tuning, memory_limit=needed << 20, **options) as llm:
    llm("word " * 60, max_tokens=4)
    print(llm.decision.config.mode)
"""


@pytest.mark.parametrize(("more", "mode"), [(0, "stable"), (12, "exact")])
def test_auto_s_limit_has_room_for_exact_mode_beside_a_patch_s_samples(model, more, mode):
    """What holds the dense weights and a patched core set does not yet hold exact mode's rows."""
    program = [sys.executable, "-W", "ignore", "-c", EXACT_AT_FIRST, model, str(more)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [mode]


def test_auto_s_limit_is_planned_for_answers_at_every_measured_temperature(model, monkeypatch):
    greedy = measured(CoreConfig(beta=0.2, patch=False), temperature=0.0, speed=2.0)
    drawn = measured(CoreConfig(beta=0.6))
    slower = measured(CoreConfig(beta=0.9), speed=1.2)
    with_dense, without = asked_for(model, monkeypatch, [greedy, drawn, slower])
    assert with_dense[0] == 0.9
    assert without == (0.6, _core.PATCH_SAMPLES, False)
    assert asked_for(model, monkeypatch, [greedy])[1] == (0.2, 0, False)


def test_auto_s_limit_is_planned_with_settings_measured_with_these_clusters(
    model, tmp_path, monkeypatch
):
    scores = [np.ones((3, 8192), np.float32)] * 6
    clusters = make_clusters(scores=scores, fingerprint=None)
    clusters.save(tmp_path / "c.npz")
    similar, rest = CoreConfig(mode="similar", gamma=0.8), {"cluster_similarity": 0.5}
    rows = [
        measured(CoreConfig(beta=0.3), clusters=clusters.digest, speed=2.0),
        measured(CoreConfig(beta=0.5)),
        measured(similar, clusters=clusters.digest, **rest),
        measured(replace(similar, gamma=0.95), clusters="others", **rest),
    ]
    for given in (clusters, tmp_path / "c.npz"):
        asked = asked_for(model, monkeypatch, rows, clusters=given)
        assert [share for share, _, _ in asked] == [0.8, 0.8]
    # Some texts are decoded with their own neurons, none with those of other clusters.
    asked = asked_for(model, monkeypatch, rows[:2] + rows[3:], clusters=clusters)
    assert [share for share, _, _ in asked] == [0.5, 0.3]
    assert [share for share, _, _ in asked_for(model, monkeypatch, rows)] == [0.5, 0.5]


@pytest.mark.parametrize(("shape", "gib"), [("opt-6.7b", 8), ("opt-13b", 14)])
def test_float_core_weights_are_planned_without_room_for_scales(tmp_path, monkeypatch, shape, gib):
    """The paper's two models in the memory of its tables: 7215 of 7856 and 13381 of 14000 MiB."""

    def sparse(path, arch, fields, tensors, data):
        with open(path, "wb") as out:
            out.write(gguf_stream._header(arch, fields, tensors))
            out.truncate(sum(t.n_bytes + 64 for t in tensors) + out.tell() + 4096)

    monkeypatch.setattr(make_synthetic_model, "write_gguf", sparse)
    path = tmp_path / "headers.gguf"
    make_paper_model(path, PAPER[shape], "F16")
    resident = _core.testing.ffn_resident_within(
        str(path), limit=gib << 30, own=336 * MIB, core_share=0.2, n_ctx=1024, n_batch=64
    )
    assert not resident  # and no refusal: a layer at a time
