"""Every setting of the configs is a keyword of `Llama` and a flag of `coreinfer run`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect

import pytest

from coreinfer import Llama
from coreinfer.cli import run
from coreinfer.config import CoreConfig, LoadConfig, SamplingConfig
from small_clusters import make_clusters_by_neurons
from tiny_llama import load

# Of every field of CoreConfig: a value that is not its default, a mode that looks at it, its flag.
CHANGED = {
    "alpha": (0.25, "stable", "--alpha 0.25"),
    "beta": (0.25, "exact", "--beta 0.25"),
    "statistic": ("count", "stable", "--statistic count"),
    "layers": ((1, None), "stable", "--layers 1:"),
    "first_layer": (1.5, "stable", "--first-layer 1.5"),
    "gamma": (0.25, "similar", "--gamma 0.25 --clusters c"),
    "blend": (0.25, "similar", "--blend 0.25 --clusters c"),
    "max_kl": (0.25, "auto", "--max-kl 0.25"),
    "start": (8, "similar", "--start 8 --clusters c"),
    "refresh": (8, "auto", "--refresh 8"),
    "max_drafts": (3, "exact", "--max-drafts 3"),
    "weighted": (True, "stable", "--weighted"),
    "patch": (32, "stable", "--patch 32"),
    "prior": (False, "stable", "--no-prior"),
}


def fields(config) -> set[str]:
    return {f.name for f in dataclasses.fields(config)}


def run_arguments(*flags: str) -> argparse.Namespace:
    """The parsed flags of `coreinfer run`."""
    parser = argparse.ArgumentParser()
    run.add_parser(parser.add_subparsers())
    return parser.parse_args(["run", "model.gguf", *flags])


def test_llama_and_the_command_line_take_every_setting_that_the_configs_have():
    settings = fields(CoreConfig) - {"mode"} | fields(LoadConfig)
    settings |= {"preset", "clusters", "embedder", "tuning"}
    keywords = set(inspect.signature(Llama).parameters)
    beside = {"model_path", "core", "last_n_tokens_size", "verbose", "prefill_progress", "others"}
    assert keywords == settings | beside
    asking = {"model", "stdin", "prompt", "file", "raw", "max_tokens", "stop", "json"}
    flags = set(vars(run_arguments())) - asking - (fields(SamplingConfig) - {"logit_bias"})
    assert flags == settings | {"mode", "core_file", "save_core", "call", "parser"}


def test_the_values_above_are_of_every_setting():
    assert set(CHANGED) == fields(CoreConfig) - {"mode"}
    for name, (value, _, _) in CHANGED.items():
        assert value != getattr(CoreConfig(), name)


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_a_setting_that_the_mode_does_not_look_at_is_refused_by_all_in_the_same_words(
    name, tiny, capsys
):
    value, mode, flags = CHANGED[name]
    error = rf"{name} is .*; it needs core=.*{mode}.*, but core is 'off'"
    for make in (
        lambda: CoreConfig(mode="off", **{name: value}),
        lambda: dataclasses.replace(CoreConfig(mode="off"), **{name: value}),
        lambda: load(tiny, core="off", **{name: value}),
    ):
        with pytest.raises(ValueError, match=error):
            make()
    args = run_arguments("--core", "off", *flags.split())
    with pytest.raises(SystemExit):
        run._core_config(args.parser, args)
    assert "no effect without --core" in capsys.readouterr().err
    # What both modes look at goes with it.
    changed = CoreConfig(mode=mode, **{name: value})
    assert changed.in_mode("off") == CoreConfig(mode="off") and changed.in_mode(mode) == changed


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_a_setting_arrives_from_llama_and_from_the_command_line(name, tiny):
    value, mode, flags = CHANGED[name]
    expected = CoreConfig(mode=mode, **{name: value})
    args = run_arguments("--core", mode, *flags.split())
    assert run._core_config(args.parser, args) == expected
    clusters = make_clusters_by_neurons() if mode == "similar" else None
    with load(tiny, core=mode, clusters=clusters, **{name: value}) as llm:
        assert llm.core == expected
