"""What sessions do beside plain decoding: on the CUDA backend and on two devices as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer import _core
from cuda_host.target import target  # noqa: F401  (a fixture)
from make_synthetic_model import make_tiny_model
from reference.neurons import jaccard
from small_shapes import small

PROMPT, MORE = (
    np.random.default_rng(seed).integers(0, 320, n, dtype=np.int32) for seed, n in ((0, 18), (1, 4))
)
SAMPLED = {"statistic": "flock", "samples": 64}
CACHE = {"type_k": "f32", "type_v": "f32"}


@pytest.fixture(scope="module", params=[-1, 1], ids=["gpu", "split"])
def n_gpu_layers(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def engines(target, n_gpu_layers, tmp_path_factory):  # noqa: F811
    """(arch, dtype) -> engines with CUDA layers and on the CPU, both with float32 activations."""
    folder = tmp_path_factory.mktemp("sessions")
    made = {}

    def get(arch: str = "llama", dtype: str = "F32", **shape) -> list[_core.Engine]:
        key = (arch, dtype, *shape.items())
        if key not in made:
            path = str(folder / f"{len(made)}.gguf")
            if dtype != "Q4_K":  # has blocks of 256
                shape = small(arch) | shape
            make_tiny_model(path, arch, dtype, n_layer=2, **shape)
            made[key] = [
                _core.Engine(path, n_gpu_layers=n, f32_activations=True) for n in (n_gpu_layers, 0)
            ]
        return made[key]

    return get


def read(engine: _core.Engine, tokens: np.ndarray = PROMPT, beta: float = 0.4, **options):
    session = _core.Session(engine, n_ctx=96, n_batch=20, **CACHE)
    session.prefill(tokens, **(SAMPLED | options))
    session.set_core(session.select(beta=beta))
    return session


def assert_close(got: np.ndarray, wanted: np.ndarray, share: float = 3e-4) -> None:
    """3e-4 of the spread: float32 sums over a few hundred terms and a handful of layers."""
    np.testing.assert_allclose(got, wanted, atol=share * np.std(wanted))


@pytest.mark.parametrize("statistic", ["count", "count_gate", "count_abs", "flock"])
@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_weighted_statistics_pick_the_cpus_neurons(engines, arch, statistic):
    ours, cpu = (read(e, statistic=statistic, weighted=True).core_set for e in engines(arch))
    assert ours.weighted
    for got, wanted in zip(ours.layers, cpu.layers, strict=True):
        # Sums in another order: only near-ties at the border may differ.
        assert jaccard(got, wanted) >= 0.99
    for got, wanted in zip(ours.scores, cpu.scores, strict=True):
        # A count may move by a token whose activation is at the border.
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=0.02 * np.max(wanted))


@pytest.mark.parametrize(
    ("arch", "dtype", "shape"),
    [
        ("llama", "Q4_0", {}),
        ("llama", "Q8_0", {"mlp_bias": True, "attention_bias": True}),
        ("gemma3", "Q4_K", {}),
        ("phi3", "Q4_0", {}),
        ("opt", "F16", {}),
    ],
)
def test_patched_neurons_answer_as_on_the_cpu(engines, arch, dtype, shape):
    both = engines(arch, dtype, **shape)
    ours, cpu = (_core.Session(e, n_ctx=96, n_batch=20, **CACHE) for e in both)
    fitted = read(both[1])
    fitted.fit_patch(rank=4)
    for session in (ours, cpu):
        session.prefill(PROMPT)
        session.set_core(fitted.core_set)
    assert ours.patch_bytes >= cpu.patch_bytes > 0  # rows are padded to whole loads there
    got, wanted = (s.verify(MORE) for s in (ours, cpu))
    assert_close(got, wanted)
    ours.keep(len(PROMPT))
    for row in got:  # one by one has the bits of all at once
        ours.decode(int(MORE[ours.n_past - len(PROMPT)]))
        np.testing.assert_array_equal(ours.logits(), row)
    # And it is the patch that was computed.
    plain = read(both[0]).verify(MORE)
    assert np.abs(got - plain).max() > 0.01 * np.std(wanted)


def test_a_patch_fitted_there_answers_as_one_fitted_on_the_cpu(engines):
    rows = []
    for engine in engines():
        session = read(engine)
        session.fit_patch(rank=4)
        assert len(session.core_set.patch) == engine.n_layer
        rows.append(session.verify(MORE))
    # The regression makes more of what rounding leaves: 2e-3 of logits of 1.
    assert_close(*rows, share=5e-3)


def test_exact_mode_is_dense_decoding_bit_for_bit(engines):
    dtype = "Q8_0"
    texts = []
    for exact in (False, True):
        session = _core.Session(engines("llama", dtype)[0], n_ctx=96, n_batch=16)
        session.prefill(PROMPT, statistic="flock")
        if exact:
            session.set_exact(paced=False, max_drafts=4)
        sampler = _core.Sampler(temperature=1.2, seed=5, top_k=0, min_p=0.0)
        rows = []
        for _ in range(8):
            session.decode(session.sample(sampler), sampler)
            rows.append(session.logits())
        texts.append((session.tokens, np.array(rows)))
        if exact:
            assert session.timings["drafted_tokens"] > 2
            counted = session.select(beta=0.4)
    assert list(texts[0][0]) == list(texts[1][0])
    np.testing.assert_array_equal(texts[1][1], texts[0][1])
    # What was decoded is counted as in a prefill.
    fresh = _core.Session(engines("llama", dtype)[0], n_ctx=96, n_batch=16)
    fresh.prefill(np.array(texts[0][0], np.int32), statistic="flock")
    assert counted.same_neurons(fresh.select(beta=0.4))


def test_a_replayed_answer_is_as_if_it_had_been_the_prompt(engines):
    sets = []
    for engine in engines():
        session = read(engine)
        for token in MORE:
            session.decode(int(token))
        assert session.n_dense == len(PROMPT)
        session.replay(**SAMPLED)
        assert session.n_dense == session.n_past == len(PROMPT) + len(MORE)
        assert session.timings["replay_tokens"] >= len(MORE)
        fresh = read(engine, np.concatenate([PROMPT, MORE]))
        assert_close(session.logits(), fresh.logits())
        sets.append(session.select(beta=0.4))
        for got, wanted in zip(sets[-1].layers, fresh.core_set.layers, strict=True):
            assert jaccard(got, wanted) >= 0.99
        session.set_core(sets[-1])
        session.fit_patch(rank=4)
        assert session.patch_bytes > 0
    for got, wanted in zip(*(s.layers for s in sets), strict=True):
        assert jaccard(got, wanted) >= 0.99


def test_a_saved_state_with_its_patch_goes_on_there_and_on_the_cpu(engines):
    ours, cpu = engines()
    session = read(ours)
    session.fit_patch(rank=4)
    state = session.save_state()
    wanted = session.verify(MORE)
    for engine in (ours, cpu):
        other = _core.Session(engine, n_ctx=96, n_batch=20, **CACHE)
        other.load_state(state)
        assert other.n_past == len(PROMPT) and other.patch_bytes > 0
        got = other.verify(MORE)
        if engine is ours:
            np.testing.assert_array_equal(got, wanted)
        else:
            assert_close(got, wanted)
