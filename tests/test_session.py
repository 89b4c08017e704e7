"""Sessions: what is kept, what is refused, and what stays usable after a refusal."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer import _core
from make_synthetic_model import make_tiny_model
from reference.neurons import core_sizes, largest


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "tiny.gguf"
    make_tiny_model(path, "llama", "Q8_0")
    return _core.Engine(str(path))


@pytest.fixture
def session(engine):
    return _core.Session(engine)


def ids(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 320, n, dtype=np.int32)


def assert_usable(session: _core.Session) -> None:
    session.reset()
    session.prefill(ids(5))
    assert np.isfinite(session.logits()).all()


def test_empty_prompt_is_refused(session):
    with pytest.raises(ValueError, match="no tokens"):
        session.prefill(ids(0))
    assert_usable(session)


@pytest.mark.parametrize("bad", [-1, 320, 2**31 - 1])
def test_token_out_of_range_is_refused_before_anything_runs(session, bad):
    session.prefill(ids(4))
    tokens = np.array([1, bad], np.int32)
    with pytest.raises(ValueError, match=f"token {bad} at position 1.*0 to 319"):
        session.prefill(tokens)
    with pytest.raises(ValueError, match=f"token {bad}"):
        session.decode(bad)
    assert session.n_past == 4


def test_prompt_longer_than_the_context_is_refused(engine):
    session = _core.Session(engine, n_ctx=16)
    with pytest.raises(ValueError, match=r"Requested tokens \(17\) exceed context window of 16"):
        session.prefill(ids(17))
    session.prefill(ids(16))
    with pytest.raises(ValueError, match="exceed context window"):
        session.decode(1)
    assert_usable(session)


def test_context_of_zero_is_the_models_own(engine):
    assert _core.Session(engine, n_ctx=0).n_ctx == engine.n_ctx_train


def test_memory_is_committed_as_it_fills(tmp_path):
    path = tmp_path / "long.gguf"
    make_tiny_model(path, "llama", "Q8_0", n_ctx=131072)
    session = _core.Session(_core.Engine(str(path)))
    session.prefill(ids(8))
    assert 0 < session.kv_bytes < 8 << 20  # of the 400 MB that the whole context would take


@pytest.mark.parametrize("arguments", [{"n_ctx": -1}, {"n_batch": 0}, {"type_k": "q4_0"}])
def test_bad_session_options_are_refused(engine, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments)).split("_")[0]):
        _core.Session(engine, **arguments)


def test_learned_positions_bound_the_context(tmp_path):
    path = tmp_path / "opt.gguf"
    make_tiny_model(path, "opt", "F16")
    engine = _core.Engine(str(path))
    with pytest.raises(ValueError, match="learned 256 positions"):
        _core.Session(engine, n_ctx=257)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5, float("nan")])
def test_bad_alpha_is_refused(session, alpha):
    with pytest.raises(ValueError, match="alpha"):
        session.prefill(ids(4), statistic="count", alpha=alpha)
    assert_usable(session)


def test_unknown_statistic_names_the_known_ones(session):
    with pytest.raises(ValueError, match="count, count_gate, count_abs, flock"):
        session.prefill(ids(4), statistic="median")


@pytest.mark.parametrize("beta", [0.0, -1.0, 1.01, float("nan")])
def test_bad_beta_is_refused(session, beta):
    session.prefill(ids(4), statistic="flock")
    with pytest.raises(ValueError, match="beta"):
        session.select(beta=beta)


@pytest.mark.parametrize("beta", [1e-9, 0.9 / 512])
def test_a_share_of_less_than_one_neuron_is_refused_and_the_text_stays(session, engine, beta):
    session.prefill(ids(4), statistic="flock")
    error = rf"beta is {beta:g}, which is less than one of a layer's 512 neurons.*1 / 512"
    for call in (
        lambda: session.select(beta=beta),
        lambda: session.stability(beta=beta),
        lambda: session.set_exact(beta=beta),
        lambda: session.prefill(ids(4), statistic="flock", beta=beta),
        lambda: _core.core_sizes(beta, n_layer=3, n_ff=512),
    ):
        with pytest.raises(ValueError, match=error):
            call()
    assert session.n_past == 4 and not session.exact
    assert [len(layer) for layer in session.select(beta=1 / 512).layers] == [1, 1, 1]


@pytest.mark.parametrize("n_ff", [49, 98, 103])
def test_one_neuron_is_enough_whatever_the_rounding_of_its_share(n_ff):
    assert _core.core_sizes(1 / n_ff, n_layer=2, n_ff=n_ff) == [1, 1]


@pytest.mark.parametrize("first_layer", [0.9, -2.0, float("inf"), float("nan")])
def test_bad_share_of_the_first_layer_is_refused(session, first_layer):
    session.prefill(ids(4), statistic="flock")
    with pytest.raises(ValueError, match="first_layer is .*, expected at least 1"):
        session.select(beta=0.4, first_layer=first_layer)
    with pytest.raises(ValueError, match="first_layer"):
        session.set_exact(first_layer=first_layer)


@pytest.mark.parametrize("beta", [0.001, 0.2, 0.45, 0.8, 1.0])
@pytest.mark.parametrize("n_layer", [1, 2, 3, 32])
@pytest.mark.parametrize("first_layer", [1.0, 2.0, 50.0])
def test_the_first_layer_keeps_more_and_the_total_stays(beta, n_layer, first_layer):
    sizes = _core.core_sizes(beta, n_layer=n_layer, n_ff=1000, first_layer=first_layer)
    assert sizes == core_sizes(beta, n_layer, 1000, first_layer)
    assert abs(sum(sizes) / n_layer - max(beta * 1000, 1)) <= 1
    assert all(1 <= size <= 1000 for size in sizes) and len(set(sizes[1:])) <= 1


def test_layers_without_the_first_keep_the_same_number():
    sizes = _core.core_sizes(0.4, n_layer=8, n_ff=100, layers=(1, 5), first_layer=2.0)
    assert sizes == [40] * 4


def test_more_neurons_of_the_first_layer_are_those_of_highest_score(session, engine):
    session.prefill(ids(20), statistic="flock")
    core = session.select(beta=0.3, first_layer=2.0)
    sizes = core_sizes(0.3, engine.n_layer, core.n_ff, 2.0)
    assert sizes[0] > sizes[1]
    for layer, scores, size in zip(core.layers, core.scores, sizes, strict=True):
        np.testing.assert_array_equal(layer, largest(scores.astype(np.float64), size))


@pytest.mark.parametrize("layers", [(-1, 2), (0, 4), (2, 2), (2, 1)])
def test_bad_layer_range_is_refused(session, layers):
    session.prefill(ids(4), statistic="flock")
    with pytest.raises(ValueError, match="layers are .* expected FIRST:LAST"):
        session.select(beta=0.4, layers=layers)


def test_selecting_without_counting_says_what_to_do(session):
    session.prefill(ids(4))
    with pytest.raises(RuntimeError, match="prefill a prompt with a statistic"):
        session.select(beta=0.4)


def test_logits_before_any_prompt_say_what_to_do(session):
    with pytest.raises(RuntimeError, match="prefill a prompt first"):
        session.logits()


def test_layers_outside_the_range_stay_dense(session, engine):
    session.prefill(ids(20), statistic="flock")
    core = session.select(beta=0.25, layers=(1, 2))
    assert [layer is None for layer in core.layers] == [True, False, True]
    assert len(core.layers[1]) == round(0.25 * engine.config["n_ff"])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([np.array([0, 5, 5], np.int32)] * 3, "ascending"),
        ([np.array([5, 1], np.int32)] * 3, "ascending"),
        ([np.array([0, 512], np.int32)] * 3, "below 512"),
        ([np.array([-1, 3], np.int32)] * 3, "ascending indices"),
        ([np.array([], np.int32)] * 3, "no neurons"),
    ],
)
def test_core_sets_that_do_not_fit_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        _core.CoreSet(layers, n_ff=512)


def test_core_set_of_another_model_is_refused(session):
    session.prefill(ids(4))
    with pytest.raises(ValueError, match="the model has 3 layers of 512"):
        session.set_core(_core.CoreSet([np.array([0], np.int32)] * 2, n_ff=512))
    assert session.core_set is None


def test_a_prefix_is_reused_only_as_far_as_it_is_dense_and_counted(session):
    prompt = ids(40)
    session.prefill(prompt, statistic="flock")
    assert session.reusable(prompt) == 39  # the last token runs again: logits are wanted
    assert session.reusable(prompt, "flock") == 32  # the scores are known at powers of two
    assert session.reusable(prompt, "count") == 0
    assert session.reusable(np.concatenate([prompt, ids(3, 1)]), "flock") == 40
    session.set_core(session.select(beta=0.5))
    session.decode(7)
    longer = np.concatenate([prompt, np.array([7, 8], np.int32)])
    assert session.reusable(longer) == 40  # the entry of 7 was written by core neurons
    with pytest.raises(RuntimeError, match="keep"):
        session.prefill(ids(2))


def test_a_reused_prefix_gives_the_core_set_of_a_fresh_prefill(engine):
    """Kept entries and scores, then the rest: the same chunks, so exactly the same set."""
    prompt, longer = ids(32), ids(70)
    fresh, reused = (_core.Session(engine, n_batch=32) for _ in range(2))
    fresh.prefill(longer, statistic="flock")
    reused.prefill(longer[:32], statistic="flock")
    reused.set_core(reused.select(beta=0.3))
    for t in prompt[:6]:
        reused.decode(int(t))
    n = reused.reusable(longer, "flock")
    assert n == 32
    reused.keep(n)
    reused.prefill(longer[n:], statistic="flock")
    a, b = fresh.select(beta=0.3), reused.select(beta=0.3)
    assert a.same_neurons(b)
    for x, y in zip(a.scores, b.scores, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(fresh.logits(), reused.logits())


def test_saved_state_continues_bit_for_bit(engine):
    first = _core.Session(engine)
    first.prefill(ids(37), statistic="flock")
    first.set_core(first.select(beta=0.4))
    first.decode(3)
    state = first.save_state()
    second = _core.Session(engine)
    second.load_state(state)
    assert second.tokens == first.tokens
    assert second.core_set.same_neurons(first.core_set)
    assert second.reusable(ids(37), "flock") == first.reusable(ids(37), "flock") == 32
    assert second.stability(beta=0.4) == first.stability(beta=0.4)
    for session in (first, second):
        session.decode(11)
    np.testing.assert_array_equal(first.logits(), second.logits())


def test_every_damaged_state_is_refused_and_harmless(engine):
    session = _core.Session(engine)
    session.prefill(ids(9), statistic="count")
    session.set_core(session.select(beta=0.4))
    state = session.save_state()
    before = session.logits()
    for end in [0, 5, 8, 20, 40, 100, len(state) // 2, len(state) - 1]:
        with pytest.raises(ValueError, match="saved state"):
            session.load_state(state[:end])
        np.testing.assert_array_equal(session.logits(), before)
    with pytest.raises(ValueError, match="longer than it says"):
        session.load_state(state + b"x")
    other_model = state[:8] + bytes(8) + state[16:]
    with pytest.raises(ValueError, match="another model"):
        session.load_state(other_model)
    rng = np.random.default_rng(0)
    for _ in range(200):  # never a crash, whatever comes
        damaged = bytearray(state)
        damaged[rng.integers(len(state))] ^= 1 << rng.integers(8)
        try:
            session.load_state(bytes(damaged))
        except (ValueError, RuntimeError):
            pass
    assert_usable(session)


def test_nan_weights_are_named_by_layer_and_token(tmp_path):
    def edit(name, values):
        if name == "blk.1.ffn_up.weight":
            values = values.copy()
            values[7] = np.nan
        return values

    path = tmp_path / "nan.gguf"
    make_tiny_model(path, "llama", "F32", edit=edit)
    session = _core.Session(_core.Engine(str(path)))
    with pytest.raises(_core.NumericError, match="layer 1 at prompt token 0"):
        session.prefill(ids(4), statistic="flock")
    with pytest.raises(_core.NumericError, match="NaN or Inf in the logits"):
        session.prefill(ids(4))
    assert session.n_past == 0


def test_layer_without_activity_is_named(tmp_path):
    def edit(name, values):
        return np.full_like(values, -5.0) if name == "blk.2.ffn_up.bias" else values

    path = tmp_path / "dead.gguf"
    make_tiny_model(path, "opt", "F32", edit=edit)
    session = _core.Session(_core.Engine(str(path)))
    session.prefill(ids(6), statistic="count")
    with pytest.raises(_core.NumericError, match="no neuron of layer 2 was active in 6"):
        session.select(beta=0.4)
    assert session.select(beta=0.4, layers=(0, 2)).layers[2] is None


def test_a_file_that_shrinks_while_in_use_is_an_error_not_a_crash(tmp_path):
    path = tmp_path / "shrinking.gguf"
    make_tiny_model(path, "llama", "F16")
    session = _core.Session(_core.Engine(str(path)))
    session.prefill(ids(20), statistic="flock")
    with open(path, "r+b") as file:
        file.truncate(4096)
    with pytest.raises(OSError, match="shrinking.gguf"):
        session.prefill(ids(3))
    with pytest.raises(OSError, match="shrinking.gguf"):
        session.decode(1)


def test_two_engines_in_two_threads_do_not_disturb_each_other(engine, tmp_path):
    import threading

    path = tmp_path / "other.gguf"
    make_tiny_model(path, "qwen2", "Q4_0")
    other = _core.Engine(str(path))

    def run(which, results):
        session = _core.Session(which)
        rows = []
        for i in range(20):
            session.reset()
            session.prefill(ids(20, i), statistic="flock")
            session.set_core(session.select(beta=0.4))
            session.decode(1)
            rows.append(session.logits())
        results.append(np.stack(rows))

    alone: list = []
    run(engine, alone)
    run(other, alone)
    a, b = [], []
    threads = [threading.Thread(target=run, args=x) for x in ((engine, a), (other, b))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    np.testing.assert_array_equal(a[0], alone[0])
    np.testing.assert_array_equal(b[0], alone[1])


def test_two_sessions_share_one_engine(engine):
    import threading

    def run(seed, results):
        session = _core.Session(engine)
        session.prefill(ids(30, seed))
        for t in range(20):
            session.decode(t)
        results[seed] = session.logits()

    alone: dict = {}
    for seed in (1, 2):
        run(seed, alone)
    together: dict = {}
    threads = [threading.Thread(target=run, args=(s, together)) for s in (1, 2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for seed in (1, 2):
        np.testing.assert_array_equal(alone[seed], together[seed])


def test_a_forked_child_is_told_to_load_again(tmp_path):
    import subprocess
    import sys

    path = tmp_path / "fork.gguf"
    make_tiny_model(path, "llama", "Q8_0")
    code = """
import os, sys
import numpy as np
from coreinfer import _core
session = _core.Session(_core.Engine(sys.argv[1], n_threads=2))
session.prefill(np.arange(5, dtype=np.int32))
pid = os.fork()
if pid == 0:
    try:
        session.decode(1)
    except RuntimeError as error:
        os._exit(7 if "fork" in str(error) else 1)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
session.decode(1)
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_ctrl_c_stops_scoring_and_leaves_the_session_usable(tmp_path):
    import _thread
    import threading

    path = tmp_path / "slow.gguf"
    make_tiny_model(path, "llama", "Q8_0", n_ctx=100000)
    session = _core.Session(_core.Engine(str(path), n_threads=1))
    session.prefill(ids(4))
    threading.Timer(0.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        session.score(ids(20000))  # many seconds
    assert 4 <= session.n_past < 20000
    assert_usable(session)


def test_stability_is_unknown_while_a_layer_was_silent(tmp_path):
    """One neuron of the last layer answers to one late token alone."""

    def edit(name, values):
        return np.full_like(values, -5.0) if name == "blk.2.ffn_up.bias" else values

    path = tmp_path / "late.gguf"
    make_tiny_model(path, "opt", "F32", edit=edit)
    session = _core.Session(_core.Engine(str(path)))
    session.prefill(ids(6), statistic="count")
    assert session.stability(beta=0.4) is None
    assert session.stability(beta=0.4, layers=(0, 2)) is not None
