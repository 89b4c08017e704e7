"""The roofline of decoding: tokens per second against the bytes that a token reads.

A point on the line reads at the machine's bandwidth; core neurons move points to the left and,
where decoding is limited by memory, up along the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_report import Line, step_bytes


def bandwidth_of(lines: Sequence[Line]) -> float | None:
    """Measured read bandwidth in GB/s, the best of all runs; None where it was not measured."""
    found = [float(line.row["read_bw_gbs"]) for line in lines if line.row.get("read_bw_gbs")]
    return max(found, default=None)


def points(lines: Sequence[Line], ours: str) -> list[tuple[str, float, Line]]:
    """(label, MiB per token, line) of every generation row whose bytes are known.

    Peers read the same file, so they stand at the bytes of our own dense row.
    """
    dense = {
        (line.model, line.test): step_bytes(line.row)
        for line in lines
        if line.program == ours and not line.core
    }
    found = []
    for line in lines:
        read = step_bytes(line.row) or dense.get((line.model, line.test))
        if line.test.startswith("tg") and read:
            found.append((f"{Path(line.model).stem}: {line.label}", read / 2**20, line))
    return found


def plot(lines: Sequence[Line], ours: str, path: Path) -> bool:
    """Write the plot as PNG. False, and no file, when no row has what it shows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    shown = points(lines, ours)
    if not shown:
        return False
    figure, axes = plt.subplots(figsize=(9.0, 6.0), dpi=150)
    models = list(dict.fromkeys(line.model for _, _, line in shown))
    for label, mib, line in shown:
        kind: dict[str, Any] = {"marker": "x", "color": "0.45"}
        if line.program == ours:
            color = f"C{models.index(line.model) % 10}"
            kind = {"marker": "D" if line.core else "o", "color": color}
        low, high = line.tok_s.median - line.tok_s.low, line.tok_s.high - line.tok_s.median
        axes.errorbar(
            mib,
            line.tok_s.median,
            yerr=[[low], [high]],
            capsize=3,
            linestyle="none",
            label=f"{label}, {line.test}",
            **kind,
        )
        name = line.label.removeprefix(f"{ours} ") if line.core else line.label
        axes.annotate(
            name, (mib, line.tok_s.median), (6, 4), textcoords="offset points", fontsize=7
        )
    bandwidth = bandwidth_of(lines)
    if bandwidth:
        mibs = [mib for _, mib, _ in shown]
        ends = [min(mibs) / 1.5, max(mibs) * 1.5]
        axes.plot(
            ends,
            [bandwidth * 1e9 / (mib * 2**20) for mib in ends],
            color="black",
            linewidth=1,
            label=f"read bandwidth {bandwidth:.1f} GB/s",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(ScalarFormatter())
        axis.set_tick_params(which="both", labelsize=7)
    axes.set_xlabel("read for a token (MiB)")
    axes.set_ylabel("tokens per second")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True
