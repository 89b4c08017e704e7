"""How close decoding stays to a reference: dense against float32 goldens, core neurons to dense.

In: a GGUF model and a golden file (prompts, forced continuations, float32 log-probabilities of the
20 likeliest tokens). Out: Markdown tables on stdout. KL20 is the divergence over those 20 outcomes
plus the rest as one; KL is over the full vocabulary; agreement is the share of positions whose
likeliest token is the same. Continuations run through `score`, that is through the decode weights.

    python tools/measure_fidelity.py MODEL.gguf GOLDEN.json --betas 0.2 0.4 0.6 0.8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from coreinfer import _core
from coreinfer.tuning import agreement, divergence
from measured_texts import add_activation

STATISTICS = ("count", "count_gate", "count_abs", "flock")


def kl20(top20: list, log_q: np.ndarray) -> float:
    """Mean over positions of KL over the 20 listed outcomes and the rest as one, in nats.

    top20 : n lists of (id, ln p); log_q : (n, n_vocab) ln q.
    """
    ids = np.array([[i for i, _ in row] for row in top20])
    log_p = np.array([[p for _, p in row] for row in top20])
    picked = np.take_along_axis(log_q.astype(np.float64), ids, axis=1)
    p, q = np.exp(log_p), np.exp(picked)
    rest_p = np.clip(1 - p.sum(axis=1), 1e-12, None)
    rest_q = np.clip(1 - q.sum(axis=1), 1e-12, None)
    return float(((p * (log_p - picked)).sum(axis=1) + rest_p * np.log(rest_p / rest_q)).mean())


class Fidelity:
    """One model and one golden file; measures dense once and core sets against it."""

    def __init__(
        self,
        model: str,
        golden: str,
        *,
        n_threads: int = 0,
        f32: bool = False,
        n_gpu_layers: int = 0,
        activation: str = "",
    ) -> None:
        self.engine = _core.Engine(
            model,
            n_threads=n_threads,
            f32_activations=f32,
            n_gpu_layers=n_gpu_layers,
            activation=activation,
        )
        self.golden = json.loads(Path(golden).read_text())
        self.session = _core.Session(self.engine)
        self.texts = [
            (np.array(g["prompt_ids"], np.int32), np.array(g["forced_ids"], np.int32), g["top20"])
            for g in self.golden["generate"]
        ]
        self.dense = [self._score(prompt, forced) for prompt, forced, _ in self.texts]

    def _score(self, prompt: np.ndarray, forced: np.ndarray) -> np.ndarray:
        self.session.reset()
        self.session.set_core(None)
        self.session.prefill(prompt)
        return self.session.score(forced)

    def dense_figures(self) -> dict[str, float]:
        """KL20 and top-1 agreement of dense decoding with the goldens."""
        kls = [kl20(t[2], d) for t, d in zip(self.texts, self.dense, strict=True)]
        hits = [
            np.mean([row[0][0] == best for row, best in zip(t[2], d.argmax(axis=1), strict=True)])
            for t, d in zip(self.texts, self.dense, strict=True)
        ]
        return {"kl20": float(np.mean(kls)), "agreement": float(np.mean(hits))}

    def core_figures(
        self,
        statistic: str,
        betas: list[float],
        *,
        alpha: float = 0.4,
        layers: tuple[int, int] | None = None,
        first_layer: float = 1.0,
        weighted: bool = False,
        patch: int = 0,
        min_prompt: int = 32,
    ) -> dict[float, dict[str, float]]:
        """Per beta: KL to dense and agreement with dense, of prompts with >= min_prompt tokens.

        `patch` is the rank of the patch, 0 for none.
        The first position comes from the dense prefill and is left out.
        """
        found: dict[float, list[tuple[float, float]]] = {beta: [] for beta in betas}
        counted = {"statistic": statistic, "alpha": alpha, "weighted": weighted}
        counted["samples"] = _core.PATCH_SAMPLES if patch else 0
        for (prompt, forced, _), dense in zip(self.texts, self.dense, strict=True):
            if len(prompt) < min_prompt:
                continue
            for beta in betas:
                self.session.reset()
                self.session.set_core(None)
                self.session.prefill(prompt, **counted)
                chosen = self.session.select(beta=beta, layers=layers, first_layer=first_layer)
                self.session.set_core(chosen)
                if patch:
                    self.session.fit_patch(rank=patch)
                got = self.session.score(forced)[1:]
                kl = float(divergence(dense[1:], got).mean())
                found[beta].append((kl, agreement(got, dense[1:])))
        return {
            beta: dict(zip(("kl", "agreement"), np.mean(rows, axis=0), strict=True))
            for beta, rows in found.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("golden")
    parser.add_argument("--statistics", nargs="*", default=list(STATISTICS), choices=STATISTICS)
    parser.add_argument("--betas", nargs="*", type=float, default=[0.2, 0.4, 0.6, 0.8])
    parser.add_argument("--alpha", type=float, default=0.4)
    parser.add_argument("--layers", type=int, nargs=2, metavar=("FIRST", "LAST"))
    parser.add_argument(
        "--first-layer", type=float, default=1.0, help="times as many neurons there (default: 1)"
    )
    parser.add_argument("--weighted", action="store_true", help="by the norms of what is written")
    parser.add_argument("--patch", type=int, default=0, metavar="RANK", help="0: no patch")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--f32", action="store_true", help="no rounding of activations")
    add_activation(parser)
    args = parser.parse_args()

    fidelity = Fidelity(
        args.model,
        args.golden,
        n_threads=args.threads,
        f32=args.f32,
        activation=args.activation or "",
    )
    backend = fidelity.engine.backend
    print(f"{Path(args.model).name}, {backend['name']} {backend['isa']}\n")
    dense = fidelity.dense_figures()
    golden = fidelity.golden
    print("| dense, against float32 | KL20 | top-1 agreement |\n| --- | --- | --- |")
    print(f"| coreinfer | {dense['kl20']:.5f} | {dense['agreement']:.4f} |")
    if "llama_cpp_mean_kl20" in golden:
        print(
            f"| llama.cpp | {golden['llama_cpp_mean_kl20']:.5f} "
            f"| {golden['llama_cpp_top1_agreement']:.4f} |"
        )
    if not args.statistics:
        return
    print(
        "\n| core neurons, against own dense: KL, agreement | "
        + " | ".join(f"β = {beta:g}" for beta in args.betas)
        + " |"
    )
    print("| --- |" + " --- |" * len(args.betas))
    for statistic in args.statistics:
        layers = tuple(args.layers) if args.layers else None
        rows = fidelity.core_figures(
            statistic,
            args.betas,
            alpha=args.alpha,
            layers=layers,
            first_layer=args.first_layer,
            weighted=args.weighted,
            patch=args.patch,
        )
        cells = " | ".join(f"{r['kl']:.3f}, {r['agreement']:.2f}" for r in rows.values())
        print(f"| {statistic} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
