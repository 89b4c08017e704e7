"""Parameters: checked where they are given, named in the error; foreign names are not swallowed."""

from __future__ import annotations

import dataclasses
import inspect
import warnings

import numpy as np
import pytest

from coreinfer import config, foreign
from coreinfer.config import CoreConfig, LoadConfig, SamplingConfig, cache_type, parse_layers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CoreConfig(mode="on"), "mode is 'on'; expected one of auto, off, stable"),
        (lambda: CoreConfig(alpha=0), r"alpha is 0; expected a number in \(0, 1\]"),
        (lambda: CoreConfig(beta=1.01), r"beta is 1.01; expected a number in \(0, 1\]"),
        (lambda: CoreConfig(beta="0.4x"), "beta is '0.4x'"),
        (lambda: CoreConfig(beta=float("nan")), "beta is nan"),
        (lambda: CoreConfig(beta=10**400), "beta is 1000"),
        (lambda: CoreConfig(statistic=np.array(["flock", "sum"])), "statistic is array"),
        (lambda: CoreConfig(statistic="sum"), "statistic is 'sum'; expected one of count,"),
        (lambda: CoreConfig(layers=(3, 3)), "layers is"),
        (
            lambda: SamplingConfig(temperature=float("inf")),
            "temperature is inf; expected a number of at least 0, and a finite one",
        ),
        (lambda: CoreConfig(layers=(-1, 3)), "layers is"),
        (lambda: CoreConfig(layers=5), "layers is 5"),
        (lambda: CoreConfig(layers="a:b"), "layers is 'a:b'; expected FIRST:LAST"),
        (lambda: CoreConfig(refresh=0), r"refresh is 0; expected an integer in \[1, "),
        (lambda: CoreConfig(refresh=-1), r"refresh is -1; expected an integer in \[1, "),
        (lambda: CoreConfig(refresh=1.5), r"refresh is 1.5; expected an integer in \[1, "),
        (lambda: CoreConfig.of(0.4), "core is 0.4"),
        (lambda: CoreConfig.of("off").changed(patch=True), "patch is True; it needs core='stable'"),
        (
            lambda: CoreConfig.of("stable").changed(max_kl=0.1),
            "max_kl is 0.1; it needs core='auto'",
        ),
        (
            lambda: CoreConfig.of("stabel"),
            "core is 'stabel'; expected one of auto, off, stable, similar, exact, paper, a CoreC",
        ),
        (lambda: SamplingConfig(temperature=-1), "temperature is -1; expected a number of at"),
        (lambda: SamplingConfig(top_p=1.5), r"top_p is 1.5; expected a number in \(0, 1\]"),
        (lambda: SamplingConfig(top_p=0), "top_p is 0; expected"),
        (lambda: SamplingConfig(typical_p=0), "typical_p is 0; expected"),
        (lambda: SamplingConfig(min_p=2), r"min_p is 2; expected a number in \[0, 1\]"),
        (lambda: SamplingConfig(top_k=2.5), "top_k is 2.5; expected an integer"),
        (lambda: SamplingConfig(repeat_penalty=0), "repeat_penalty is 0; expected a number above"),
        (lambda: SamplingConfig(temperature=float("inf")), "temperature is inf"),
        (lambda: SamplingConfig(logit_bias=[1]), r"logit_bias is \[1\]"),
        (lambda: SamplingConfig(logit_bias={1: float("nan")}), "logit_bias is"),
        (lambda: LoadConfig(n_ctx=-1), r"n_ctx is -1; expected an integer in \[0, "),
        (lambda: LoadConfig(n_batch=0), "n_batch is 0"),
        (lambda: LoadConfig(n_ctx=2**70), r"expected an integer in \[0, 67108864\]"),
        (lambda: LoadConfig(n_batch=65537), r"expected an integer in \[1, 65536\]"),
        (lambda: LoadConfig(n_gpu_layers=-2), "n_gpu_layers is -2"),
        (lambda: LoadConfig(vram_limit=0), "vram_limit is 0"),
        (lambda: LoadConfig(vram_limit="1KiB"), "vram_limit is 1024; .* n_gpu_layers is 0"),
        (lambda: LoadConfig(n_batch=True), "n_batch is True"),
        (lambda: LoadConfig(n_threads=0), "n_threads is 0"),
        (lambda: LoadConfig(n_threads=1025), r"expected an integer in \[1, 1024\]"),
        (lambda: LoadConfig(type_k="q4_0"), "type_k is 'q4_0'; expected one of f32, f16, q8_0"),
        (lambda: LoadConfig(f32_activations=1), "f32_activations is 1"),
        (lambda: LoadConfig(memory_limit="lots"), "memory_limit is 'lots'; expected a number of"),
        (lambda: LoadConfig(memory_limit=0), "memory_limit is 0"),
        (lambda: LoadConfig(memory_limit="2 GiBB"), "memory_limit is '2 GiBB'"),
    ],
)
def test_values_out_of_range_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_stable_alone_is_flock_at_forty_percent_in_all_layers():
    assert CoreConfig.of("stable") == CoreConfig("stable", 0.4, 0.4, "flock", None)
    assert config.DEFAULT_CORE_MODE == "auto"


def test_layer_ranges_are_read_and_checked_against_the_model():
    assert parse_layers("6:26") == (6, 26)
    assert parse_layers(":20") == (0, 20)
    assert CoreConfig(layers="4:").layer_range(30) == (4, 30)
    assert CoreConfig().layer_range(30) is None
    with pytest.raises(ValueError, match="6:40.*<= 30, the model's layers"):
        CoreConfig(layers=(6, 40)).layer_range(30)
    with pytest.raises(ValueError, match="30:30"):
        CoreConfig(layers="30:").layer_range(30)


def test_memory_limits_are_bytes_or_text_with_a_unit():
    sizes = ["2GiB", "1.5 KiB", "500MB", "3kb", "77", 77]
    expected = [2 << 30, 1536, 500_000_000, 3000, 77, 77]
    assert [LoadConfig(memory_limit=size).memory_limit for size in sizes] == expected


def test_cache_types_may_be_named_as_llama_cpp_python_does():
    assert [cache_type(v, "f16") for v in (None, 0, 1, 8, "Q8_0")] == [
        "f16",
        "f32",
        "f16",
        "q8_0",
        "q8_0",
    ]
    with pytest.raises(ValueError, match="type_k is '2'"):
        LoadConfig(type_k=cache_type(2, "f16"))


def test_every_parameter_has_a_help_text_and_a_valid_default():
    for cls in (CoreConfig, SamplingConfig, LoadConfig):
        cls()
        for f in dataclasses.fields(cls):
            assert len(f.metadata["spec"].help) > 10


def test_keyword_defaults_are_those_of_the_configs():
    llama = pytest.importorskip("coreinfer.llama", reason="the extension is not built").Llama
    names = {"temp": "temperature"}
    for method in (llama.sample, llama.generate, llama.create_completion):
        for name, p in inspect.signature(method).parameters.items():
            field = names.get(name, name)
            if field in {f.name for f in dataclasses.fields(SamplingConfig)}:
                assert p.default == getattr(SamplingConfig, field), (method, name)
    for name, p in inspect.signature(llama.__init__).parameters.items():
        if hasattr(LoadConfig, name) and not name.startswith("type_"):
            assert p.default == getattr(LoadConfig, name)


def check(**arguments):
    foreign.check_foreign("Llama", arguments, foreign.CONSTRUCTOR, ["n_ctx", "n_threads"])


def test_arguments_without_effect_are_named_in_one_warning():
    with pytest.warns(UserWarning) as caught:
        check(n_ubatch=1, flash_attn=True, use_mlock=True)
    assert len(caught) == 1
    assert "n_ubatch, flash_attn, use_mlock" in str(caught[0].message)


def test_neutral_values_of_foreign_arguments_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(n_ubatch=512, use_mmap=True, lora_path=None, rope_freq_base=0.0, embedding=False)
        asked = {"tools": [], "functions": [], "response_format": {"type": "text"}}
        foreign.check_foreign("create_chat_completion", asked, foreign.CHAT, [])


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(TypeError, match="'n_thread'; did you mean 'n_threads'"):
        check(n_thread=2)
    with pytest.raises(TypeError, match="'flash_atn'; did you mean 'flash_attn'"):
        check(flash_atn=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'zzzz'$"):
        check(zzzz=1)


def test_arguments_that_would_change_the_answer_are_refused():
    with pytest.raises(ValueError, match="does not support lora_path='x'"):
        check(lora_path="x")
    with pytest.raises(ValueError, match="does not support embedding=True"):
        check(embedding=True)
