"""The paper's own figures (arXiv 2410.18311) beside a report's: rows of text, from stages' data.

Shapes that no single device holds are measured at two depths of a few layers; every layer costs the
same, so a line through the two gives the full depth: what comes of it is an extrapolation, and is
called so. A figure whose measurements are not there is "not measured".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from device_targets import Data, core_of
from synthetic_shapes import PAPER

SCALED = {"llama2-70b f16": (2, 6), "opt-66b f16": (2, 6)}  # the depths that are measured
FITTED = ("dense_seconds_a_token", "dense_bytes_a_token", "weight_bytes")
FITTED_CORE = ("seconds_a_token", "bytes_a_token")


def at_depth(name: str, n_layer: int) -> str:
    """What the stage is called that runs a shape with so many layers."""
    return f"{name}, {n_layer} layers"


def scaled(data: Data, name: str) -> dict[str, Any]:
    """A shape of SCALED at its full depth; KeyError where a depth was not measured."""
    few, more = SCALED[name]
    runs = [data[at_depth(name, n)] for n in (few, more)]
    full = PAPER[name.split()[0]].n_layer

    def line(values: Mapping[str, float], others: Mapping[str, float], key: str) -> float:
        slope = (others[key] - values[key]) / (more - few)
        return values[key] + slope * (full - few)

    result: dict[str, Any] = {key: line(runs[0], runs[1], key) for key in FITTED}
    result["core"] = [
        {"beta": core["beta"]}
        | {key: line(core, core_of(runs[1], core["beta"]), key) for key in FITTED_CORE}
        for core in runs[0]["core"]
    ]
    return result


def rows(data: Data) -> list[tuple[str, str, str]]:
    """(what, the paper's, ours), the paper's input being about 64 tokens."""

    def text(value: Callable[[], str]) -> str:
        try:
            return value()
        except (KeyError, StopIteration, ZeroDivisionError, IndexError):
            return "not measured"

    def offloaded() -> str:
        run = data["opt-6.7b f16 transformers in 8 GiB"]
        return f"{1 / run['seconds_a_token']:.2f} tok/s, {run['peak_device_bytes'] / 1e9:.2f} GB"

    def limited() -> str:
        run = data["opt-6.7b f16 in 8 GiB"]
        core = core_of(run, 0.2)
        chosen = core["select_seconds"] + core["compact_seconds"]
        return (
            f"{1 / core['seconds_a_token']:.2f} tok/s, {run['peak_device_bytes'] / 1e9:.2f} GB; "
            f"choosing once, no predictor: {1e3 * chosen:.2f} ms"
        )

    def llama_7b() -> str:
        run = data["llama2-7b f16"]
        return ", ".join(f"{1 / c['seconds_a_token']:.1f} (β = {c['beta']:g})" for c in run["core"])

    def llama_70b() -> str:
        run = scaled(data, "llama2-70b f16")
        core = core_of(run, 0.2)
        faster = run["dense_seconds_a_token"] / core["seconds_a_token"]
        return f"{1 / core['seconds_a_token']:.1f} tok/s, {faster:.1f}× own dense, extrapolated"

    def opt_66b() -> str:
        run = scaled(data, "opt-66b f16")
        core = core_of(run, 0.2)["bytes_a_token"]
        return (
            f"{core / 1e9:.0f} GB of {run['weight_bytes'] / 1e9:.0f} GB of weights decode, "
            "extrapolated"
        )

    titan, a100 = "OPT-6.7B, 12 GB TITAN XP", "A100"
    return [
        (f"{titan}: Transformers", "1.92 tok/s, 12 GB", text(offloaded)),
        (f"{titan}: DejaVu", "2.73 tok/s; predictor 9.62 ms, 1.85 GB", "not run"),
        (f"{titan}: PowerInfer", "7.32 tok/s, 9.26 GB; predictor 15.96 ms, 3.36 GB", "not run"),
        (f"{titan}: CoreInfer", "19.83 tok/s, 7.28 GB", text(limited)),
        (f"{a100}, Llama-2-7B: CoreInfer", "57.2 tok/s", text(llama_7b)),
        (
            f"{a100}, Llama-2-70B: CoreInfer",
            "17.2 tok/s, 5.5× Transformers, up to 2.3× PowerInfer",
            text(llama_70b),
        ),
        (
            f"{a100}, OPT-66B: CoreInfer",
            "59 GB, against 78 GB and 44 GB of host memory",
            text(opt_66b),
        ),
    ]
