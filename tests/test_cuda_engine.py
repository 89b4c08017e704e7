"""Whole models on the CUDA backend: the oracle's logits and core sets, graphs, limits, refusals."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from coreinfer import Llama, _core, loading
from coreinfer.bench import binary_path
from cuda_host.build import cublas_library, interleaved_library
from cuda_host.target import HAS_DEVICE, target  # noqa: F401  (a fixture)
from make_synthetic_model import make_tiny_model
from model_shape import ARCHITECTURES
from reference import neurons as oracle
from reference.model import ReferenceModel
from reference.quant import kl_divergence, log_softmax
from small_shapes import small

GOLDEN = np.load(Path(__file__).parent / "golden" / "transformers_logits.npz")


def tokens_of(n: int, n_vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n_vocab, n, dtype=np.int32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(arch, dtype) -> path; made once."""
    folder = tmp_path_factory.mktemp("cuda")

    def get(arch: str, dtype: str = "F32", **overrides) -> str:
        made = "_".join(f"{key}{value}" for key, value in overrides.items())
        path = folder / f"{arch}_{dtype}_{made}.gguf"
        if not path.exists():
            make_tiny_model(path, arch, dtype, **overrides)
        return str(path)

    return get


@pytest.fixture(scope="module", params=["rows", "products"])
def batches(request, target) -> Iterator[str]:  # noqa: F811
    """How batches above 16 tokens run: without cuBLAS, or with it (on the host a stand-in)."""
    variable = "COREINFER_CUBLAS_LIBRARY"
    before = os.environ.get(variable)
    if request.param == "rows":
        os.environ[variable] = "none"
    elif target == "host":
        os.environ[variable] = str(cublas_library())
    yield request.param
    if before is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = before


def on_gpu(path: str, **options) -> _core.Engine:
    return _core.Engine(path, n_gpu_layers=-1, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_equal_the_float64_oracle(batches, models, arch):
    path = models(arch, **small(arch))
    engine = on_gpu(path, f32_activations=True)
    assert ("without cuBLAS" in engine.backend["description"]) == (batches == "rows")
    tokens = tokens_of(25, engine.n_vocab)
    expected = ReferenceModel(path).forward(tokens).logits
    session = _core.Session(engine, type_k="f32", type_v="f32")
    session.prefill(tokens[:21])  # above the 16 rows of the exact path
    # Float32 sums over a few hundred terms and a handful of layers: 1e-5 relative, with room.
    tolerance = 3e-4 * expected.std()
    np.testing.assert_allclose(session.logits(), expected[20], atol=tolerance)
    for i in range(21, 25):
        session.decode(int(tokens[i]))
        np.testing.assert_allclose(session.logits(), expected[i], atol=tolerance)


@pytest.mark.parametrize("case", ["llama_yarn", "qwen2_yarn_long", "phi3_long"])
def test_logits_equal_transformers(batches, tmp_path, case):
    path = str(tmp_path / "m.gguf")
    make_tiny_model(path, **json.loads(str(GOLDEN["cases"]))[case])
    tokens, expected = GOLDEN[f"{case}.tokens"], GOLDEN[f"{case}.logits"]
    session = _core.Session(on_gpu(path, f32_activations=True), type_k="f32", type_v="f32")
    for at, logits in zip(GOLDEN[f"{case}.positions"], expected, strict=True):
        session.keep(0)
        if at > 0:
            session.prefill(tokens[:at])
        session.decode(int(tokens[at]))
        np.testing.assert_allclose(session.logits(), logits, atol=3e-4 * expected.std())


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q4_0", "Q4_K", "Q6_K"])
def test_fast_activations_stay_close_to_the_oracle(batches, models, dtype):
    path = models("llama", dtype)
    tokens = tokens_of(40, 320)
    expected = log_softmax(ReferenceModel(path).forward(tokens).logits)
    session = _core.Session(on_gpu(path))
    session.prefill(tokens[:30])
    got = session.score(np.concatenate([tokens[30:], [0]]).astype(np.int32))
    # The CPU's integer path, which this is, too, gives 0.0007 to 0.0035 here (n_batch=16).
    assert kl_divergence(expected[29:], got).mean() < 0.004


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        ("llama", {}),
        ("llama", {"mlp_bias": True, "attention_bias": True}),
        ("llama", {"mlp_bias": True, "types": {"ffn_gate": "F16"}}),
        ("llama-relu", {}),
        ("llama-relu", {"mlp_bias": True}),
        ("phi3", {}),
        ("opt", {}),
    ],
)
def test_core_sets_and_scores_through_them_equal_the_oracle(batches, models, arch, shape):
    path = models(arch, n_layer=2, **small(arch), **shape)
    engine = on_gpu(path, f32_activations=True)
    reference = ReferenceModel(path)
    tokens = tokens_of(24, engine.n_vocab, seed=2)
    forward = reference.forward(tokens[:20])
    session = _core.Session(engine, type_k="f32", type_v="f32")
    for statistic in ("count", "count_gate", "count_abs", "flock"):
        session.reset()
        session.prefill(tokens[:20], statistic=statistic, alpha=0.4)
        core = session.select(beta=0.3)
        expected = oracle.core_sets(statistic, forward.h, forward.act, 0.4, 0.3)
        # Float32 against float64 activations: only near-ties at the border may differ.
        for got, wanted in zip(core.layers, expected, strict=True):
            assert oracle.jaccard(got, wanted) >= 0.99, statistic
    session.set_core(core)
    got = session.score(tokens[20:])
    expected = reference.score(tokens[:20], tokens[20:], core.layers)
    np.testing.assert_allclose(got, expected, atol=1e-3)


@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
@pytest.mark.parametrize("dtype", ["F16", "Q4_0"])
def test_verified_rows_have_the_bits_of_decoded_ones(target, models, arch, dtype):  # noqa: F811
    engine = on_gpu(models(arch, dtype, **small(arch)))
    tokens = tokens_of(20, engine.n_vocab, seed=5)
    session = _core.Session(engine)
    session.prefill(tokens[:10], statistic="flock")
    session.set_core(session.select(beta=0.5))
    one_by_one = []
    for t in tokens[10:]:
        session.decode(int(t))
        one_by_one.append(session.logits())
    for n in (3, 10):
        session.keep(10)
        together = [session.verify(tokens[i : min(i + n, 20)]) for i in range(10, 20, n)]
        np.testing.assert_array_equal(np.concatenate(together), np.stack(one_by_one))


def host_count(what: str) -> int:
    count = getattr(ctypes.CDLL(os.environ["COREINFER_CUDA_LIBRARY"]), f"cuda_host_{what}")
    count.restype = ctypes.c_long
    return count()


def least_limit(path: str, **options) -> int:
    return least(lambda limit: on_gpu(path, vram_limit=limit, **options))


def least(load: Callable[[int], object]) -> int:
    """What a limit that does not suffice is refused with, in bytes."""
    limit = 1 << 20
    for _ in range(3):  # that of the backend alone comes first, which does not know the model
        with pytest.raises(MemoryError, match="(vram_limit|free memory) is .* MiB") as refused:
            load(limit)
        message = str(refused.value)
        own = re.search(r"backend needs ([0-9.]+) MiB", message)
        if own is None:
            return int(re.search(r"but (\d+) MiB are needed", message)[1]) << 20
        limit = round((float(own[1]) + 1) * (1 << 20))
    raise AssertionError(message)


def test_fused_tensors_are_planned_as_the_matrices_that_they_become(target, models):  # noqa: F811
    """Each takes whole pages of the device's memory, as much as where it is a tensor by itself."""
    plain = {"n_layer": 2, "n_ff": 9600, "n_vocab": 320}  # 2.5 MiB: one page and a quarter
    phi3 = plain | {"sliding_window": None, "rope_dim": None, "rope_scaling": None}
    options = {"n_ctx": 64, "n_batch": 20, "core_share": 0.1}
    apart, fused = (
        least_limit(path, **options)
        for path in (models("llama", "Q8_0", **plain), models("phi3", "Q8_0", **phi3))
    )
    assert fused == apart


COUNTED = ("graph_launches", "kernel_launches", "allocations", "copies")


def counted_steps(session: _core.Session, tokens) -> list[list[int]]:
    """What decoding each of the tokens asked the runtime for."""
    steps = []
    for token in tokens:
        before = [host_count(what) for what in COUNTED]
        session.decode(token)
        steps.append([host_count(what) - n for what, n in zip(COUNTED, before, strict=True)])
    return steps


@pytest.mark.parametrize(
    ("arch", "dtype", "mode"),
    [
        ("llama", "Q4_0", "dense"),
        ("llama", "Q4_0", "core"),
        ("llama", "Q4_0", "patched"),
        ("llama", "Q8_0", "limited"),
        ("gemma3", "F16", "patched"),
        ("opt", "F16", "limited"),
        ("phi3", "Q8_0", "limited"),
    ],
)
def test_a_token_is_one_graph_launch_and_three_copies(target, models, arch, dtype, mode):  # noqa: F811
    if target != "host":
        pytest.skip("the host runtime counts launches")
    limited = mode == "limited"
    path = models(arch, dtype, **small(arch) | {"n_layer": 12 if limited else 3, "n_ff": 768})
    options = {"n_ctx": 64, "n_batch": 20, "core_share": 0.1}
    engine = on_gpu(path, vram_limit=least_limit(path, **options) if limited else 0, **options)
    assert engine.ffn_resident != limited
    session = _core.Session(engine, n_ctx=64, n_batch=20)
    samples = 16 if mode == "patched" else 0
    session.prefill(tokens_of(18, engine.n_vocab), statistic="flock", samples=samples)
    if mode != "dense":
        session.set_core(session.select(beta=0.1))
    if mode == "patched":
        session.fit_patch(rank=4)
    steps = counted_steps(session, range(5))
    # The first step is issued plainly, the second captured; then the embedding goes in, the
    # position too, and logits come out.
    assert [graphs for graphs, *_ in steps] == [0, 1, 1, 1, 1]
    assert steps[2:] == [[1, 0, 0, 3]] * 3


# Those that differ in what they launch.
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "phi3", "olmo2", "opt"])
@pytest.mark.parametrize("dtype", ["F16", "Q4_0"])
@pytest.mark.parametrize("mode", ["dense", "core"])
def test_a_layer_is_few_launches(target, models, arch, dtype, mode):  # noqa: F811
    """Each waits for the one before it, which takes as long as some of them compute."""
    if target != "host":
        pytest.skip("the host runtime counts launches")
    steps = []
    for n_layer in (2, 3):
        engine = on_gpu(models(arch, dtype, n_layer=n_layer))
        session = _core.Session(engine, n_ctx=64, n_batch=20)
        session.prefill(tokens_of(18, engine.n_vocab), statistic="flock")
        if mode == "core":
            session.set_core(session.select(beta=0.3))
        steps += counted_steps(session, [0])  # the first is issued plainly, kernel by kernel
    # A norm (of gemma3 with the residual before it) and the queries, keys and values; attention;
    # the projection; a norm (likewise) and the hidden row; the projection down. 8-bit codes of the
    # hidden row are made by one more.
    expected = 7 + (dtype == "Q4_0")
    if arch == "olmo2":
        # Norms of queries and of keys; and what no norm goes before has its codes made alone.
        expected += 2 + 2 * (dtype == "Q4_0")
    assert steps[1][1] - steps[0][1] == expected


@pytest.mark.parametrize("statistic", ["flock", "count_gate"])
def test_a_draft_and_a_verification_are_one_graph_launch_each(target, models, statistic):  # noqa: F811
    if target != "host":
        pytest.skip("the host runtime counts launches")
    engine = on_gpu(models("llama", "Q4_0", n_layer=3, n_embd=160, n_ff=768))
    session = _core.Session(engine, n_ctx=64, n_batch=20)
    session.prefill(tokens_of(18, engine.n_vocab), statistic=statistic)
    session.set_exact(paced=False, max_drafts=3, text=False)
    steps = []
    for token in range(6):  # of which one may come to be expected: then another
        steps += counted_steps(session, [token + 100 * (session.expected == token)])
    # Three drafts and a verification, of each the first issued plainly, the second captured; one
    # copy more puts the accepted token's activations with those to be counted.
    assert [graphs for graphs, *_ in steps] == [2, 4, 4, 4, 4, 4]
    assert steps[2:] == [[4, 0, 0, 4 * 3 + 1]] * 4


def test_verifications_of_all_lengths_stay_graphs(target, models):  # noqa: F811
    if target != "host":
        pytest.skip("the host runtime counts launches")
    engine = on_gpu(models("llama", "Q4_0", n_layer=1, **small()))
    session = _core.Session(engine, n_ctx=64, n_batch=20)
    session.prefill(tokens_of(51, engine.n_vocab), statistic="flock")
    session.set_core(session.select(beta=0.3))
    session.reset()
    session.prefill(tokens_of(51, engine.n_vocab))
    session.set_exact(paced=False, max_drafts=12, text=False)
    for _ in range(3):
        steps = []
        while session.n_past < 64:  # what is left of the context bounds the drafts
            token = session.n_past
            steps += counted_steps(session, [token + 100 * (session.expected == token)])
        assert session.timings["verifications"] % 12 == 0
        session.keep(51)
    expected = [[drafts + 1, 0] for drafts in range(12, -1, -1)]
    assert [[graphs, kernels] for graphs, kernels, *_ in steps] == expected


def test_decoding_asks_for_no_memory_however_long_it_gets(target, models):  # noqa: F811
    if target != "host":
        pytest.skip("the host runtime counts allocations")
    engine = on_gpu(models("llama", "Q4_0", n_layer=1, **small()))
    session = _core.Session(engine, n_ctx=1200)
    session.prefill(tokens_of(500, engine.n_vocab))
    for token in range(2):
        session.decode(token)
    before = host_count("allocations")
    for token in range(20):  # across position 512, where a step's attention takes more spans
        session.decode(token)
    assert host_count("allocations") == before


def test_a_session_keeps_its_position_when_another_one_follows_at_once(target):  # noqa: F811
    if target != "host":
        pytest.skip("the sessions are interleaved in C++, which the host's compiler compiles")
    make = ctypes.CDLL(os.environ["COREINFER_CUDA_LIBRARY"]).coreinfer_make_cuda_backend
    assert ctypes.CDLL(str(interleaved_library())).interleaved(make) == 0


def test_a_limit_below_the_model_streams_it_and_changes_no_bit(target, models):  # noqa: F811
    path = models("llama", "Q8_0", n_ff=4096, n_layer=6)
    tokens = tokens_of(24, 320)
    resident = on_gpu(path, vram_limit=1 << 30)
    own = (1 << 30) - resident.backend["device_memory"]
    # Of each matrix, 1.1 MiB, the plan counts the page of 2 MiB that it takes.
    limited = on_gpu(path, vram_limit=own + resident.weight_bytes + (8 << 20))
    assert resident.ffn_resident and not limited.ffn_resident
    results = []
    for engine in (resident, limited):
        session = _core.Session(engine, n_ctx=32, n_batch=24)
        session.prefill(tokens[:3], statistic="flock")
        session.set_core(session.select(beta=0.1))
        results.append(session.score(tokens[3:6]))
    np.testing.assert_array_equal(*results)
    with pytest.raises(MemoryError, match="needed for"):
        on_gpu(path, vram_limit=own + resident.ffn_bytes // 4)


@pytest.mark.parametrize(("dtype", "layers"), [("F16", None), ("Q4_K", (1, 9))])
def test_layers_gathered_on_the_way_are_those_gathered_from_resident_ones(
    batches, models, dtype, layers
):
    """Two batches under a limit, each layer copied while another computes: not a bit differs."""
    path = models("llama", dtype, n_ff=768, n_layer=9)
    tokens = tokens_of(22, 320)
    resident = on_gpu(path, vram_limit=1 << 30)
    own = (1 << 30) - resident.backend["device_memory"]
    limit = own + resident.weight_bytes
    limited = on_gpu(path, vram_limit=limit)
    assert resident.ffn_resident and not limited.ffn_resident
    results, compact_bytes = [], []
    for engine, options in [(resident, {}), (limited, {}), (limited, {"beta": 0.1})]:
        session = _core.Session(engine, n_ctx=64, n_batch=17)
        session.prefill(tokens[:19], statistic="flock", layers=layers, **options)
        session.set_core(session.select(beta=0.1, layers=layers))
        compact_bytes.append(session.timings["compact_bytes"])
        results.append(np.concatenate([session.logits()[None], session.score(tokens[19:])]))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
    # Tables of each layer are rounded up by themselves.
    assert compact_bytes[0] == compact_bytes[1] <= compact_bytes[2] < 1.1 * compact_bytes[0]
    assert limited.backend["device_peak"] <= limit


def test_a_batch_of_weighted_statistics_takes_no_more_than_planned(
    target,  # noqa: F811
    models,
    monkeypatch,
):
    if target == "host":
        monkeypatch.setenv("COREINFER_CUBLAS_LIBRARY", str(cublas_library()))
    path = models("llama", "Q8_0", n_embd=64, n_ff=16384, n_layer=1)
    peaks, planned = [], []
    for n_batch in (32, 96):  # activations of 2 and of 6 MiB, whole pages
        options = {"n_ctx": 96, "n_batch": n_batch, "core_share": 0.1}
        engine = on_gpu(path, vram_limit=1 << 30, **options)
        session = _core.Session(engine, n_ctx=96, n_batch=n_batch)
        session.prefill(tokens_of(n_batch, 320), statistic="flock", weighted=True)
        session.set_core(session.select(beta=0.1))
        peaks.append(engine.backend["device_peak"])
        planned.append(least_limit(path, **options))
    assert peaks[1] - peaks[0] <= planned[1] - planned[0]
    # Nor much less: another form of the widest rows is planned as floats, and is float16.
    assert planned[1] - planned[0] <= 1.25 * (peaks[1] - peaks[0])


def test_auto_decides_at_once_where_the_free_memory_is_short(target, models, monkeypatch):  # noqa: F811
    if target != "host":
        pytest.skip("a device's free memory cannot be chosen")
    path = models("llama", "Q8_0", n_ff=4096, n_layer=7)
    options = {"n_gpu_layers": -1, "n_ctx": 64, "n_batch": 16, "verbose": False}

    def with_memory(size: int) -> None:
        reserve = 256 << 20  # is kept back
        monkeypatch.setenv("CUDA_HOST_MEMORY", str(reserve + size))

    def load(size: int) -> None:
        with_memory(size)
        Llama(path, core="stable", **options)

    with_memory(least(load))
    planned, load_for = [], loading._load

    def planned_load(file, config, cores, **rest):
        planned.append([core.mode for core in cores])
        return load_for(file, config, cores, **rest)

    monkeypatch.setattr(loading, "_load", planned_load)
    with Llama(path, core="auto", **options) as llm:
        assert planned == [["exact"], ["stable"]]
        with pytest.warns(UserWarning, match="dense FFN weights do not stay in memory"):
            llm("ab", max_tokens=1)
        assert llm.decision.config.mode == "stable" and llm.core_set.patch
    with pytest.raises(MemoryError, match="the GPU's free memory is .* which exact mode"):
        Llama(path, core="exact", **options)


def test_sessions_of_one_engine_in_two_threads_do_not_disturb_each_other(target, models):  # noqa: F811
    """Core weights are given back by one while the other computes."""
    import threading

    engine = on_gpu(models("llama", "Q4_0", **small()))

    def run(seed: int, rows: list) -> None:
        session = _core.Session(engine, n_ctx=64)
        for i in range(3):
            session.reset()
            session.prefill(tokens_of(6, 320, seed + i), statistic="flock")
            session.set_core(session.select(beta=0.3))
            session.decode(1)
            rows.append(session.logits())

    alone: list = []
    run(0, alone)
    both: list[list] = [[], []]
    threads = [threading.Thread(target=run, args=(0, rows)) for rows in both]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for rows in both:
        np.testing.assert_array_equal(rows, alone)


def test_whatever_thread_computes_does_so_on_the_engines_device(target, models, monkeypatch):  # noqa: F811
    if target != "host":
        pytest.skip("the host runtime can claim a second device, and counts calls")
    import threading

    monkeypatch.setenv("CUDA_HOST_DEVICES", "2")
    monkeypatch.setenv("COREINFER_CUBLAS_LIBRARY", str(cublas_library()))
    calls_on = ctypes.CDLL(os.environ["COREINFER_CUDA_LIBRARY"]).cuda_host_calls_on
    calls_on.restype = ctypes.c_long
    before = [calls_on(device) for device in range(2)]
    path = models("llama", "Q4_0")
    held: list = [on_gpu(path, main_gpu=1)]

    def turns(*steps: Callable[[], object]) -> None:
        for step in steps:  # each in a thread whose device is the first
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()

    turns(
        lambda: held.append(_core.Session(held[0], n_ctx=64)),
        lambda: held[1].prefill(tokens_of(18, 320), statistic="flock"),
        lambda: held[1].set_core(held[1].select(beta=0.3)),
        *[lambda: held[1].decode(1)] * 3,
        lambda: held[1].load_state(held[1].save_state()),
        lambda: held.append(_core.Session(held[0], n_ctx=32)),
        lambda: held.clear(),
    )
    assert calls_on(0) == before[0] and calls_on(1) > before[1]


def test_the_bench_measures_on_a_gpu_and_says_which(target, models):  # noqa: F811
    path = models("llama", "Q4_0", **small())
    command = [str(binary_path()), "-m", path, "-ngl", "99", "-o", "json"]
    command += ["-p", "8", "-n", "3", "-r", "1", "--core", "stable"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 4
    for row in rows:
        assert (row["backends"], row["n_gpu_layers"], row["main_gpu"]) == ("CUDA", 99, 0)
        assert row["gpu_info"] != ""
        assert row["read_bw_gbs"] is None  # that of the host says nothing here
    missing = os.environ | {"COREINFER_CUDA_LIBRARY": "missing.so"}
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300, env=missing)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "the CUDA backend cannot be opened" in refused.stderr


def test_the_device_takes_part():
    if not HAS_DEVICE:
        pytest.skip("no NVIDIA device on this machine: the CUDA kernels ran on the host alone")
    assert "without cuBLAS" not in _core.testing.AnyBackend("CUDA").description


@pytest.mark.parametrize("arch", ["llama", "gemma3", "phi3", "opt"])
@pytest.mark.parametrize("n", [1, 2])
def test_the_last_layers_on_the_gpu_and_the_others_on_the_cpu_give_the_oracles_logits(
    target,  # noqa: F811
    models,
    arch,
    n,
):
    path = models(arch, **small(arch))
    engine = _core.Engine(path, n_gpu_layers=n, f32_activations=True)
    assert engine.backend["name"] == "CUDA+CPU"
    assert f"layers from {engine.n_layer - n} on: CUDA" in engine.backend["description"]
    tokens = tokens_of(25, engine.n_vocab)
    expected = ReferenceModel(path).forward(tokens).logits
    session = _core.Session(engine, type_k="f32", type_v="f32")
    session.prefill(tokens[:21])
    tolerance = 3e-4 * expected.std()  # as on one device
    np.testing.assert_allclose(session.logits(), expected[20], atol=tolerance)
    for i in range(21, 25):
        session.decode(int(tokens[i]))
        np.testing.assert_allclose(session.logits(), expected[i], atol=tolerance)


def test_core_neurons_and_saved_states_work_across_both_devices(target, models):  # noqa: F811
    for arch in ("llama", "phi3", "opt"):
        path = models(arch)
        tokens = tokens_of(24, 320, seed=2)
        engine = _core.Engine(path, n_gpu_layers=2, f32_activations=True)
        session = _core.Session(engine, type_k="f32", type_v="q8_0")
        session.prefill(tokens[:20], statistic="flock")
        core = session.select(beta=0.3)
        session.set_core(core)
        state = session.save_state()
        got = session.score(tokens[20:])
        other = _core.Session(engine, type_k="f32", type_v="q8_0")
        other.load_state(state)
        np.testing.assert_array_equal(other.score(tokens[20:]), got)
        on_cpu = _core.Session(
            _core.Engine(path, f32_activations=True), type_k="f32", type_v="q8_0"
        )
        on_cpu.prefill(tokens[:20])
        on_cpu.set_core(core)
        # 8-bit values: one that rounds the other way is 1/127 of the largest of 32.
        np.testing.assert_allclose(got, on_cpu.score(tokens[20:]), atol=0.02)


def test_a_limit_of_host_memory_holds_with_layers_on_the_gpu(target, models):  # noqa: F811
    """Staged layers and their core, gathered on the way, end up on their own device."""
    path = models("llama", "Q8_0", n_ff=4096, n_layer=12)
    tokens = tokens_of(16, 320)
    rss = [_core.memory()["rss"]]
    engines = []
    for _ in range(2):  # the second one shows what an engine takes beside its weights
        engines.append(_core.Engine(path, n_gpu_layers=1))
        rss.append(_core.memory()["rss"])
    free = engines[0]
    taken = max(0, rss[2] - rss[1] - free.weight_bytes)
    # Halfway between what streaming and what staying needs.
    limit = rss[2] + taken + free.weight_bytes - free.ffn_bytes // 3
    limited = _core.Engine(path, n_gpu_layers=1, memory_limit=limit)
    assert free.ffn_resident and not limited.ffn_resident
    results = []
    for engine, beta in [(free, None), (limited, 0.1)]:
        session = _core.Session(engine, n_ctx=32, n_batch=6)
        session.prefill(tokens[:10], statistic="flock", beta=beta)
        session.set_core(session.select(beta=0.1))
        results.append(session.score(tokens[10:]))
    np.testing.assert_array_equal(*results)


def test_unknown_numbers_of_layers_and_devices_are_refused(target, models):  # noqa: F811
    path = models("llama", "Q4_0")
    with pytest.raises(ValueError, match="n_gpu_layers is -2, expected 0 .* or -1"):
        _core.Engine(path, n_gpu_layers=-2)
    with pytest.raises(ValueError, match="main_gpu is 99, expected 0 to"):
        on_gpu(path, main_gpu=99)
    with pytest.raises(MemoryError, match="but the device .* has"):
        on_gpu(path, vram_limit=1 << 50)


def test_a_build_without_the_library_says_so(models, monkeypatch, tmp_path):
    monkeypatch.setenv("COREINFER_CUDA_LIBRARY", str(tmp_path / "missing.so"))
    with pytest.raises(RuntimeError, match="CUDA backend cannot be opened: .*missing.so"):
        on_gpu(models("llama", "Q4_0"))


def test_no_device_is_said_and_never_replaced_by_the_cpu(target, models, monkeypatch):  # noqa: F811
    if target != "host":
        pytest.skip("the host runtime can claim to have no device")
    monkeypatch.setenv("CUDA_HOST_DEVICES", "0")
    with pytest.raises(RuntimeError, match="no usable NVIDIA GPU .*n_gpu_layers=0"):
        on_gpu(models("llama", "Q4_0"))


@pytest.mark.parametrize(
    ("ptx", "driver", "overlaps"), [(90, 13000, True), (80, 13000, False), (90, 12020, None)]
)
def test_kernels_start_early_only_where_they_wait(
    target,  # noqa: F811
    models,
    monkeypatch,
    ptx,
    driver,
    overlaps,
):
    """The wait is in code compiled for sm_90; PTX for an older device has none."""
    if target != "host":
        pytest.skip("the host runtime can claim other builds and drivers")
    monkeypatch.setenv("CUDA_HOST_PTX", str(ptx))
    monkeypatch.setenv("CUDA_HOST_DRIVER", str(driver))
    if overlaps is None:
        with pytest.raises(RuntimeError, match="driver version is insufficient.*n_gpu_layers=0"):
            on_gpu(models("llama", "Q4_0"))
        return
    before = host_count("overlapping_launches")
    session = _core.Session(on_gpu(models("llama", "Q4_0")))
    session.prefill(tokens_of(3, 320))
    assert (host_count("overlapping_launches") > before) == overlaps


def test_a_device_that_the_build_does_not_cover_is_named(target, models, monkeypatch):  # noqa: F811
    if target != "host":
        pytest.skip("the host runtime can claim another build")
    monkeypatch.setenv("CUDA_HOST_PTX", "0")
    wanted = r"compute capability 9\.0.*COREINFER_CUDA_ARCHITECTURES=90"
    with pytest.raises(RuntimeError, match=wanted):
        on_gpu(models("llama", "Q4_0"))


def test_layers_that_do_not_fit_the_gpu_are_refused_with_what_to_do(target, models):  # noqa: F811
    path = models("llama", "Q8_0", n_ff=4096, n_layer=6)
    gpu = on_gpu(path, vram_limit=1 << 30)
    # A layer takes three pages of 2 MiB.
    limit = (1 << 30) - gpu.backend["device_memory"] + (8 << 20)
    with pytest.raises(MemoryError, match="vram_limit is .* lower n_gpu_layers"):
        _core.Engine(path, n_gpu_layers=5, vram_limit=limit)
    _core.Engine(path, n_gpu_layers=1, vram_limit=limit)


def test_a_model_above_the_free_memory_passes_through_without_a_limit(
    target,  # noqa: F811
    models,
    monkeypatch,
):
    if target != "host":
        pytest.skip("the host runtime can claim another size of memory")
    path = models("llama", "Q8_0", n_ff=4096, n_layer=6)
    resident = on_gpu(path, vram_limit=1 << 30)
    own = (1 << 30) - resident.backend["device_memory"]
    room = resident.weight_bytes + (8 << 20)  # a page of 2 MiB for each matrix of 1.1 MiB
    reserve = 256 << 20
    monkeypatch.setenv("CUDA_HOST_MEMORY", str(own + room + reserve))
    passing = on_gpu(path)
    assert resident.ffn_resident and not passing.ffn_resident
    assert passing.backend["device_memory"] == room
    tokens = tokens_of(6, 320)
    results = []
    for engine in (resident, passing):
        session = _core.Session(engine, n_ctx=32, n_batch=16)
        session.prefill(tokens[:3], statistic="flock")
        session.set_core(session.select(beta=0.1))
        results.append(session.score(tokens[3:]))
    np.testing.assert_array_equal(*results)
    assert passing.backend["device_peak"] <= own + room


@pytest.mark.parametrize(("share", "kept"), [(0.4, 2), (0.6, 1)])
def test_graphs_count_towards_the_limit(target, models, monkeypatch, share, kept):  # noqa: F811
    """Those that fit are kept; else the last is, and the others make room for it."""
    if target != "host":
        pytest.skip("the host runtime says what graphs take")
    limit = 1 << 30
    engine = on_gpu(models("llama", "F16", n_layer=1, **small()), vram_limit=limit)
    tokens = tokens_of(24, engine.n_vocab)
    session = _core.Session(engine, n_ctx=64, n_batch=20)
    session.prefill(tokens[:20])
    before = engine.backend["device_peak"]
    size = round((limit - before) * share)
    monkeypatch.setenv("CUDA_HOST_GRAPH", str(size))
    results = []
    for step in (1, 2) * 3:  # each becomes a graph when it comes again
        session.keep(20)
        rows = [session.verify(tokens[i : i + step]) for i in range(20, 24, step)]
        results.append(np.concatenate(rows))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    assert (engine.backend["device_peak"] - before) // size == kept  # and some kilobytes


def test_three_hundredths_of_a_large_memory_are_kept_back(target, models, monkeypatch):  # noqa: F811
    if target != "host":
        pytest.skip("the host runtime can claim another size of memory")
    path = models("llama", "Q4_0")
    own = (1 << 30) - on_gpu(path, vram_limit=1 << 30).backend["device_memory"]
    monkeypatch.setenv("CUDA_HOST_MEMORY", str(100 << 30))
    assert on_gpu(path).backend["device_memory"] == (97 << 30) - own


def test_a_limit_that_the_backend_itself_fills_is_refused(batches, models):
    path = models("llama", "Q4_0")
    for limit in (1, 50 << 20):
        with pytest.raises(MemoryError, match=r"vram_limit is .* MiB, but .* for its own work"):
            on_gpu(path, vram_limit=limit)


def test_a_device_that_others_have_filled_is_named(target, models, monkeypatch):  # noqa: F811
    if target != "host":
        pytest.skip("the host runtime can claim another size of memory")
    monkeypatch.setenv("CUDA_HOST_MEMORY", str(300 << 20))
    wanted = r"the GPU's free memory is 44\.0 MiB, but .* for its own work"
    with pytest.raises(MemoryError, match=wanted):
        on_gpu(models("llama", "Q4_0"))


@pytest.mark.parametrize("dtype", ["F16", "Q3_K"])
def test_the_vram_limit_that_a_message_asks_for_is_enough(batches, models, dtype):
    path = models("llama", dtype, n_embd=256, n_ff=2048, n_layer=12)
    options = {"n_ctx": 64, "n_batch": 24, "core_share": 0.2, "samples": 16}
    needed = least_limit(path, **options)
    engine = on_gpu(path, vram_limit=needed, **options)
    assert not engine.ffn_resident
    session = _core.Session(engine, n_ctx=64, n_batch=24)
    session.prefill(tokens_of(17, 320), statistic="count_gate", samples=16, beta=0.2)
    session.set_core(session.select(beta=0.2))
    session.fit_patch(rank=4)
    session.decode(1)
    assert engine.backend["device_peak"] <= needed


def test_what_fails_to_open_leaves_nothing_behind(target, models, monkeypatch):  # noqa: F811
    if target != "host":
        pytest.skip("the host runtime counts what there is, and fails when asked to")
    path = models("llama", "Q4_0")
    cublas = ctypes.CDLL(str(cublas_library()))
    monkeypatch.setenv("COREINFER_CUBLAS_LIBRARY", str(cublas_library()))
    cublas.cublas_host_handles.restype = ctypes.c_long
    before = (host_count("alive"), cublas.cublas_host_handles())
    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="cudaMallocHost"):
        patch.setenv("CUDA_HOST_PINNED", "4096")  # positions, and no staging
        on_gpu(path)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cublasSetWorkspace"):
        patch.setenv("CUBLAS_HOST_WORKSPACE", "0")
        on_gpu(path)
    with pytest.raises(MemoryError):
        on_gpu(path, vram_limit=1)
    engine = on_gpu(path)
    session = _core.Session(engine)
    session.prefill(tokens_of(20, 320))
    session.decode(1)
    assert (host_count("alive"), cublas.cublas_host_handles()) > before
    del session, engine
    assert (host_count("alive"), cublas.cublas_host_handles()) == before


def test_memory_that_others_have_taken_meanwhile_is_said(target, models, monkeypatch):  # noqa: F811
    if target != "host":
        pytest.skip("the host runtime can refuse memory")
    engine = on_gpu(models("llama", "Q4_0"))
    monkeypatch.setenv("CUDA_HOST_LARGEST", str(1 << 20))
    with pytest.raises(MemoryError, match="KV cache: .* MiB are free: other programs"):
        _core.Session(engine, n_ctx=32768)
