"""One measurement on a GPU, printed as JSON: the device's own limits, a real model against its
golden file, a model of ours, or the same shape in Transformers. Each figure is printed when it is
there, a line for a part, so that what ends a measurement early leaves the ones before it.
device_report.py runs it, a process a measurement: one that fails or runs out of memory does not end
the others.

Written without a GPU at hand: its figures have not been read yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))


def say(figures: dict[str, Any]) -> None:
    """Prints a line of JSON at once."""
    print(json.dumps(figures), flush=True)


def median_seconds(run: Callable[[], None], repetitions: int) -> float:
    """Median wall time of run(), which must end with a wait for the device."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(_: argparse.Namespace) -> None:
    """Copy bandwidth (bytes read and written), float16 product rate, host-to-device rate."""
    import torch

    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)

    say(
        {
            "device": properties.name,
            "device_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "torch": torch.__version__,
        }
    )

    def timed(run: Callable[[], object], repetitions: int) -> float:
        run()
        torch.cuda.synchronize()
        return median_seconds(lambda: (run(), torch.cuda.synchronize()), repetitions)

    n = 1 << 31
    source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    say({"copy_bytes_s": 2 * n / timed(lambda: target.copy_(source), 10)})
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device=device) for _ in range(2))
    say({"f16_flop_s": 2 * 8192**3 / timed(lambda: a @ b, 10)})
    pinned = torch.ones(1 << 30, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty_like(pinned, device=device)
    seconds = timed(lambda: on_device.copy_(pinned, non_blocking=True), 5)
    say({"host_to_device_bytes_s": (1 << 30) / seconds})


def golden(args: argparse.Namespace) -> None:
    """Dense decoding against a golden file: as close to float32 as llama.cpp's, or an error."""
    from measure_fidelity import Fidelity

    fidelity = Fidelity(args.model, args.golden, n_gpu_layers=-1)
    figures = fidelity.dense_figures()
    kl_bar = 1.1 * fidelity.golden["llama_cpp_mean_kl20"]
    agreement_bar = fidelity.golden["llama_cpp_top1_agreement"] - 0.005
    say(figures | {"kl20_bar": kl_bar, "agreement_bar": agreement_bar})
    if figures["kl20"] > kl_bar or figures["agreement"] < agreement_bar:
        raise SystemExit(
            f"KL20 is {figures['kl20']:.5f}, agreement {figures['agreement']:.4f}; expected at "
            f"most {kl_bar:.5f} and at least {agreement_bar:.4f}"
        )


def ours(args: argparse.Namespace) -> None:
    """Prefill, counting, selecting, compacting, and decoding dense and with core neurons."""
    from coreinfer import _core

    betas = [float(b) for b in args.beta.split(",")] if args.beta else []
    limit = int(args.vram_limit * 2**30)
    start = time.perf_counter()
    engine = _core.Engine(
        args.model,
        n_gpu_layers=-1,
        vram_limit=limit,
        core_share=max(betas, default=0.0),
        n_ctx=args.n_ctx,
        n_batch=args.prompt,
    )
    say(
        {
            "backend": engine.backend["description"],
            "load_seconds": time.perf_counter() - start,
            "weight_bytes": engine.weight_bytes,
            "ffn_bytes": engine.ffn_bytes,
            "ffn_resident": engine.ffn_resident,
            "prompt": args.prompt,
            "n_layer": engine.n_layer,
        }
    )
    session = _core.Session(engine, n_ctx=args.n_ctx, n_batch=args.prompt)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, engine.n_vocab, args.prompt, dtype=np.int32)
    tokens = rng.integers(0, engine.n_vocab, args.gen + 4).tolist()

    def prefill(statistic: str | None) -> None:
        session.reset()
        session.prefill(prompt, statistic=statistic)

    def choose(beta: float) -> dict[str, float]:
        session.set_core(None)
        session.reset()
        start = time.perf_counter()
        session.prefill(prompt, statistic="flock", beta=beta)
        prefilled = time.perf_counter()
        core = session.select(beta=beta)
        selected = time.perf_counter()
        session.set_core(core)
        compacted = time.perf_counter()
        return {
            "time_to_first_token": compacted - start,
            "prefill_seconds": prefilled - start,
            "select_seconds": selected - prefilled,
            "compact_seconds": compacted - selected,
        }

    def decode() -> float:
        for token in tokens[:4]:  # the step becomes a graph
            session.decode(token)
        start = time.perf_counter()
        for token in tokens[4:]:
            session.decode(token)
        return (time.perf_counter() - start) / args.gen

    streamed = not engine.ffn_resident
    if not streamed:
        prefill(None)  # workspaces are taken, cuBLAS is warm
        say({"prefill_seconds": median_seconds(lambda: prefill(None), 3)})
        seconds = decode()
        say({"dense_seconds_a_token": seconds, "dense_bytes_a_token": session.decode_weight_bytes})
        for statistic in ("count", "flock"):
            prefill(statistic)
            seconds = median_seconds(lambda s=statistic: prefill(s), 3)
            say({f"prefill_{statistic}_seconds": seconds})
    core_figures: list[dict[str, Any]] = []
    for beta in betas:
        first = choose(beta)  # takes memory that the others find there
        again = [choose(beta) for _ in range(3)]
        seconds = decode()
        core_figures.append(
            {key: statistics.median(times[key] for times in again) for key in first}
            | {f"first_{key}": value for key, value in first.items()}
            | {
                "beta": beta,
                "compact_bytes": session.timings["compact_bytes"],
                "compact_source_bytes": session.timings["compact_source_bytes"],
                "seconds_a_token": seconds,
                "bytes_a_token": session.decode_weight_bytes,
            }
        )
        say({"core": core_figures, "peak_device_bytes": engine.backend["device_peak"]})


def transformers(args: argparse.Namespace) -> None:
    """The same shape in Transformers, under a limit with accelerate: it keeps as many layers on the
    device as fit beside a GiB for the context and what a layer works with, the others come in with
    every token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    from synthetic_shapes import PAPER

    s = PAPER[args.shape]
    if s.arch == "opt":
        config = OPTConfig(
            vocab_size=s.n_vocab,
            hidden_size=s.n_embd,
            ffn_dim=s.n_ff,
            num_hidden_layers=s.n_layer,
            num_attention_heads=s.n_head,
            max_position_embeddings=s.n_ctx,
            word_embed_proj_dim=s.n_embd,
        )
        cls = OPTForCausalLM
    else:
        config = LlamaConfig(
            vocab_size=s.n_vocab,
            hidden_size=s.n_embd,
            intermediate_size=s.n_ff,
            num_hidden_layers=s.n_layer,
            num_attention_heads=s.n_head,
            num_key_value_heads=s.n_head_kv,
            max_position_embeddings=s.n_ctx,
        )
        cls = LlamaForCausalLM
    torch.set_default_dtype(torch.float16)
    if args.vram_limit > 0:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.vram_limit * 2**30 / total))
        from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights

        with init_empty_weights():
            model = cls(config)
        model.to_empty(device="cpu")
        for p in model.parameters():
            p.data.fill_(0.01)
        model.tie_weights()
        room = {0: int((args.vram_limit - 1) * 2**30), "cpu": 100 << 30}
        blocks = ["OPTDecoderLayer", "LlamaDecoderLayer"]
        device_map = infer_auto_device_map(model, room, no_split_module_classes=blocks)
        say({"offloaded": [name for name, where in device_map.items() if where == "cpu"]})
        model = dispatch_model(model, device_map)
    else:
        with torch.device("cuda"):
            model = cls(config)
    model.eval()
    prompt = torch.randint(0, s.n_vocab, (1, args.prompt), device="cuda")

    def seconds_of(n: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, min_new_tokens=n, max_new_tokens=n, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds_of(2)
    first, rest = seconds_of(1), seconds_of(args.gen + 1)
    say(
        {
            "prompt": args.prompt,
            "time_to_first_token": first,
            "seconds_a_token": (rest - first) / args.gen,
            "peak_device_bytes": torch.cuda.max_memory_allocated(),
        }
    )


def main() -> int:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["ceilings", "golden", "ours", "transformers"])
    parser.add_argument("--model", default="", help="GGUF file, for golden and ours")
    parser.add_argument("--golden", default="", help="JSON file of the model, for golden")
    parser.add_argument("--shape", default="", help="a shape of synthetic_shapes.py")
    parser.add_argument("--beta", default="", help="shares of neurons, separated by commas")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--n-ctx", type=int, default=1024)
    parser.add_argument("--vram-limit", type=float, default=0.0, help="GiB; 0: none")
    args = parser.parse_args()
    run = {"ceilings": ceilings, "golden": golden, "ours": ours, "transformers": transformers}
    run[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
