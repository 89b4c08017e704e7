"""What a device report's figures say about the targets: one row a target, from the stages' data.

In: stage name -> its JSON (device_bench.py). Out: rows of text. A target whose measurements are not
there is "not measured", never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from synthetic_shapes import PAPER

Data = Mapping[str, Mapping[str, Any]]
DECODE_SHARES = {"f16": 0.85, "q8_0": 0.80, "q4_0": 0.70, "q4_k": 0.70}
LIMITED = [("opt-6.7b f16", 8.0), ("opt-13b f16", 14.0)]


def core_of(run: Mapping[str, Any], beta: float) -> Mapping[str, Any]:
    """The figures of one share of neurons."""
    return next(c for c in run["core"] if abs(c["beta"] - beta) < 1e-9)


def rows(data: Data) -> list[tuple[str, str, str]]:
    """(what, target, found) in the order of the targets."""
    found: list[tuple[str, str, str]] = []

    def add(what: str, target: str, value: Callable[[], float], limit: str = ".3g") -> None:
        try:
            text = format(value(), limit)
        except (KeyError, StopIteration, ZeroDivisionError, IndexError):
            text = "not measured"
        found.append((what, target, text))

    def copy() -> float:
        return data["ceilings"]["copy_bytes_s"]

    for dtype, share in DECODE_SHARES.items():

        def of_copy(name: str = f"llama2-7b {dtype}") -> float:
            run = data[name]
            return run["dense_bytes_a_token"] / run["dense_seconds_a_token"] / copy()

        add(f"dense decode, 7B {dtype}, share of copy bandwidth", f"≥ {share:g}", of_copy)
    for beta in (0.2, 0.4):

        def of_bytes(beta: float = beta) -> float:
            run = data["llama2-7b f16"]
            core = core_of(run, beta)
            faster = run["dense_seconds_a_token"] / core["seconds_a_token"]
            return faster / (run["dense_bytes_a_token"] / core["bytes_a_token"])

        add(f"core decode ÷ dense, 7B f16, β = {beta:g}, of the byte ratio", "≥ 0.9", of_bytes)
    for dtype in DECODE_SHARES:

        def of_peer(name: str = f"llama2-7b {dtype}") -> float:
            peer = next(r for r in data[f"{name} llama-bench"]["rows"] if r["n_gen"] > 0)
            return 1 / data[name]["dense_seconds_a_token"] / peer["avg_ts"]

        add(f"dense decode ÷ llama.cpp, 7B {dtype}", "≥ 1", of_peer)

    def prefill_share() -> float:
        run, shape = data["llama2-7b f16"], PAPER["llama2-7b"]
        # Two operations a weight and token, of two bytes in f16; the head sees the last row alone.
        layers = run["dense_bytes_a_token"] - 2 * shape.n_vocab * shape.n_embd
        return layers * run["prompt"] / run["prefill_seconds"] / data["ceilings"]["f16_flop_s"]

    add("prefill, 7B f16, 512 tokens, share of the product rate", "≥ 0.5", prefill_share)
    for statistic in ("count", "flock"):

        def counting(statistic: str = statistic) -> float:
            run = data["llama2-7b f16"]
            return run[f"prefill_{statistic}_seconds"] / run["prefill_seconds"] - 1

        add(f"counting ({statistic}), share of prefill, 7B f16", "≤ 0.05", counting)

    def choosing() -> float:
        core = core_of(data["llama2-7b f16"], 0.2)
        moved = (core["compact_bytes"] + core["compact_source_bytes"]) / copy()
        return (core["select_seconds"] + core["compact_seconds"]) / moved

    add("select + compact, 7B f16, β = 0.2, over bytes moved ÷ bandwidth", "≤ 3", choosing)
    for name, limit in LIMITED:
        limited, peer = f"{name} in {limit:g} GiB", f"{name} transformers in {limit:g} GiB"
        short = f"{name}, β = 0.2, {limit:g} GiB"

        def of_offload(limited: str = limited, peer: str = peer) -> float:
            return data[peer]["seconds_a_token"] / core_of(data[limited], 0.2)["seconds_a_token"]

        def of_free(limited: str = limited, name: str = name) -> float:
            if data[name]["prompt"] != data[limited]["prompt"]:
                raise KeyError("prompt")  # another core set, a longer context: no comparison
            free = core_of(data[name], 0.2)["seconds_a_token"]
            return free / core_of(data[limited], 0.2)["seconds_a_token"]

        def of_limit(limited: str = limited, limit: float = limit) -> float:
            return data[limited]["peak_device_bytes"] / 2**30 / limit

        def first_token(limited: str = limited) -> float:
            run = data[limited]
            streamed = run["ffn_bytes"] / data["ceilings"]["host_to_device_bytes_s"]
            return core_of(run, 0.2)["time_to_first_token"] / streamed

        add(f"{short}: decode ÷ Transformers + accelerate", "≥ 40", of_offload)
        add(f"{short}: decode ÷ without a limit", "≥ 0.95", of_free)
        add(f"{short}: peak of allocations ÷ limit", "≤ 1", of_limit)
        add(f"{short}: first token ÷ (streamed bytes ÷ host-to-device rate)", "≤ 1.5", first_token)
    return found
