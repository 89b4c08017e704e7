"""What is wrong is said, and the object goes on: arguments, files, threads, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest

from coreinfer import CoreConfig, GGUFError, Llama, _core
from coreinfer.cli import main
from coreinfer.llama import ModelPathError
from coreinfer.tokenizer import TokenizerError
from make_synthetic_model import make_tiny_model
from small_clusters import make_clusters_by_neurons
from tiny_llama import PROMPT, load, take


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.generate([1, 320]), r"prompt\[1\] is 320; expected a token id from 0 to 319"),
        (lambda m: m.generate([-1]), r"prompt\[0\] is -1"),
        (lambda m: m.generate([2**40]), r"prompt\[0\] is 1099511627776"),
        (
            lambda m: m.generate([1, 1.5]),
            "prompt is a list with 1.5 at position 1; expected text, or",
        ),
        (
            lambda m: m.generate([[1], [2]]),
            r"a list with \[1\] at position 0; expected text, or a seq",
        ),
        (lambda m: m.generate([[1], [2, 3]]), r"a list with \[1\] at position 0; expected text"),
        (lambda m: m.generate(["a", "b"]), "a list with 'a' at position 0; expected text"),
        (lambda m: m.generate([1, True, None]), "a list with True at position 1; expected text"),
        (lambda m: m.generate([True, True]), "a list with True at position 0; expected text"),
        (lambda m: m.generate(None), r"None \(NoneType\); expected text, or a sequence of token"),
        (lambda m: m.generate({1: 2}), r"prompt is \{1: 2\} \(dict\); expected text"),
        (lambda m: m.generate(np.ones((2, 2))), "an array of float64 with 2 dimensions; expected"),
        (lambda m: m.generate([2**70]), r"prompt\[0\] is 1180591620717411303424; expected a token"),
        (lambda m: m.create_completion(5), r"prompt is 5 \(int\); expected text, or a sequence"),
        (lambda m: m.generate([]), "the prompt is empty"),
        (lambda m: m([]), "the prompt is empty"),
        (lambda m: m.score([], [1]), "the prompt is empty"),
        (lambda m: m.score([1], [320]), r"continuation_ids\[0\] is 320"),
        (lambda m: m.score([1] * 200, [1] * 58), r"Requested tokens \(257\) exceed .* of 256"),
        (lambda m: m.generate([1] * 257), r"Requested tokens \(257\) exceed context window of 256"),
        (lambda m: m([1] * 256), r"Requested tokens \(257\) exceed context window of 256"),
        (lambda m: m("x " * 5000), "exceed context window of 256; shorten the text"),
        (lambda m: m.eval([1] * 257), "exceed context window"),
        (lambda m: m.eval([999]), r"tokens\[0\] is 999"),
        (lambda m: m.eval("x"), r"tokens is 'x' \(str\); expected a sequence of token ids"),
        (lambda m: m.detokenize([1.0]), "tokens is a list with 1.0 at .*; expected a sequence of"),
        (
            lambda m: m("a\ud800"),
            r"its character 1 is half of a surrogate pair, '\\ud800'",
        ),
        (lambda m: m.detokenize([320]), r"tokens\[0\] is 320"),
        (lambda m: m("x", temperature=-1), "temperature is -1"),
        (lambda m: m.generate("x", top_p=2), "top_p is 2"),
        (lambda m: m("x", logprobs=-1), "logprobs is -1"),
        (lambda m: m("x", stop=[""]), "expected strings that are not empty"),
        (lambda m: m("x", logit_bias={1.5: 1}), r"logit_bias is \{1.5: 1\}; expected a mapping"),
        (
            lambda m: m("x", logits_processor=lambda ids, logits: None),
            r"a logits processor returned None; expected shape \(320,\)",
        ),
        (
            lambda m: m("x", logits_processor=lambda ids, logits: logits[1:]),
            r"a logits processor returned shape \(319,\); expected shape \(320,\)",
        ),
        (lambda m: m("x", suffix="y"), "does not support suffix='y'"),
        (lambda m: m("x", grammar="y"), "does not support grammar='y'"),
        (lambda m: m.create_chat_completion([{"role": "user"}], top_logprobs=2), "needs logprobs"),
        (lambda m: m.set_seed(-2), "seed is -2"),
    ],
)
def test_bad_arguments_are_value_errors_that_leave_the_object_usable(llm, call, error):
    with pytest.raises(ValueError, match=error):
        call(llm)
    assert len(take(2, llm.generate(PROMPT))) == 2


@pytest.mark.parametrize(
    ("core", "error"),
    [
        ({"beta": 1e-4}, "beta is 0.0001"),
        ({"mode": "exact", "beta": 1e-4}, "beta is 0.0001"),
        ({"mode": "similar", "gamma": 2e-4}, "gamma is 0.0002"),
    ],
)
def test_a_share_below_one_neuron_is_refused_and_the_setting_stays(tiny, llm, core, error):
    error += ", which is less than one of a layer's 512 neurons; expected at least 1 / 512"
    before = llm.core
    with pytest.raises(ValueError, match=error):
        llm.core = CoreConfig(**core)
    with pytest.raises(ValueError, match=error):
        load(tiny, core=CoreConfig(**core), clusters=make_clusters_by_neurons())
    assert llm.core is before and len(take(2, llm.generate(PROMPT))) == 2


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m("x", max_tokens="5"), "max_tokens is '5'; expected an integer or None"),
        (lambda m: m("x", max_tokens=2.0), "max_tokens is 2.0"),
        (lambda m: m("x", logprobs="1"), "logprobs is '1'; expected an integer or None"),
        (lambda m: m("x", logprobs=True), "logprobs is True"),
        (lambda m: m("x", stop=b"y"), "stop is b'y'; expected a string, or a list of strings"),
        (lambda m: m("x", stop=5), "stop is 5"),
        (lambda m: m("x", logits_processor=5), "logits_processor is 5; expected a callable"),
        (lambda m: m.generate("x", stopping_criteria=[5]), r"stopping_criteria is \[5\]"),
        (lambda m: m.sample(logits_processor="x"), "logits_processor is 'x'"),
        (lambda m: load(m.model_path, prefill_progress=5), "prefill_progress is 5"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(llm, call, error):
    with pytest.raises(TypeError, match=error):
        call(llm)


def test_an_empty_text_is_the_bos_or_an_error(tiny, tmp_path):
    with load(tiny) as llm:
        assert llm("", max_tokens=1)["usage"]["prompt_tokens"] == 1
    path = tmp_path / "nobos.gguf"
    make_tiny_model(path, extra_metadata={"tokenizer.ggml.add_bos_token": False})
    with load(str(path)) as llm, pytest.raises(ValueError, match="empty.*adds no BOS"):
        llm("")


def test_an_error_about_a_file_s_tokenizer_or_template_says_which_file(tmp_path, capsys):
    path = str(tmp_path / "asks for an EOS.gguf")
    make_tiny_model(path, extra_metadata={"tokenizer.ggml.add_eos_token": 1})
    error = f"{path}: tokenizer.ggml.add_eos_token must be true or false, found 1"
    with pytest.raises(TokenizerError, match=f"^{re.escape(error)}$"):
        load(path)
    assert main(["tokenize", path, "x"]) == 1
    assert error in capsys.readouterr().err
    assert main(["info", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unsupported"] == [error]
    path = str(tmp_path / "template.gguf")
    for template, error in (
        ("{% if %}", "the chat template is malformed"),
        ("", "the file has no"),
    ):
        make_tiny_model(path, extra_metadata={"tokenizer.chat_template": template})
        with load(path) as llm, pytest.raises(ValueError, match=f"^{re.escape(path)}: {error}"):
            llm.create_chat_completion([{"role": "user", "content": "x"}])


def test_sampling_before_reading_is_an_error(llm):
    with pytest.raises(RuntimeError, match="nothing to sample from; call eval first"):
        llm.sample()


@pytest.mark.parametrize("refresh", [0, -1, 1.5, True])
def test_a_refresh_that_is_no_number_of_tokens_is_refused(tiny, refresh):
    for core in ("stable", "similar", "auto"):
        with pytest.raises(ValueError, match=rf"refresh is {refresh}; expected an integer"):
            load(tiny, core=core, refresh=refresh)


def test_a_memory_limit_that_cannot_be_met_says_what_is_needed(tiny):
    with pytest.raises(MemoryError, match="memory_limit is 1.0 MiB, but .* MiB are needed"):
        load(tiny, memory_limit="1MiB")
    with load(tiny, memory_limit="64GiB", core="stable") as llm:
        assert len(take(2, llm.generate(PROMPT))) == 2


def test_unknown_arguments_suggest_the_nearest(llm):
    with pytest.raises(TypeError, match="'max_token'; did you mean 'max_tokens'"):
        llm("x", max_token=3)
    with pytest.raises(TypeError, match="'temperature'; did you mean|unexpected.*'temperature'"):
        llm.generate("x", temperature=3)
    with pytest.raises(TypeError, match="'n_contxt'"):
        Llama(llm.model_path, n_contxt=3)


def test_foreign_arguments_warn_once(tiny):
    with pytest.warns(UserWarning, match="n_ubatch, flash_attn") as caught:
        Llama(tiny, verbose=False, n_ubatch=1, flash_attn=True).close()
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_gpu_is_asked_of_the_core_and_never_ignored(tiny, monkeypatch):
    asked = {}
    engine = _core.Engine

    def remember(path, **options):
        asked.update(options)
        return engine(path, **{**options, "n_gpu_layers": 0, "main_gpu": 0, "vram_limit": 0})

    monkeypatch.setattr(_core, "Engine", remember)
    load(tiny, n_gpu_layers=-1, main_gpu=1, vram_limit="1GiB").close()
    assert (asked["n_gpu_layers"], asked["main_gpu"], asked["vram_limit"]) == (-1, 1, 1 << 30)


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(ModelPathError, match="does not exist") as error:
        Llama(tmp_path / "none.gguf")
    assert isinstance(error.value, FileNotFoundError) and isinstance(error.value, ValueError)
    with pytest.raises(ValueError, match="known model: use coreinfer.resolve_model"):
        Llama("smollm2")
    (tmp_path / "text.gguf").write_text("this is no model, but it is long enough for a header")
    with pytest.raises(GGUFError):
        Llama(tmp_path / "text.gguf")
    with pytest.raises(OSError):
        Llama(tmp_path)


def test_a_model_path_need_not_be_utf8(tiny, tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff.gguf"
    with pytest.raises(ModelPathError, match="does not exist"):
        Llama(odd)
    os.symlink(tiny, odd)
    with load(odd) as llm:
        assert os.fsencode(llm.model_path) == odd


def test_a_closed_object_says_so(tiny):
    llm = load(tiny)
    tokens = llm.generate(PROMPT)
    next(tokens)
    llm.close()
    llm.close()
    for call in (
        lambda: next(tokens),
        lambda: llm("x"),
        lambda: next(llm.generate([1])),
        lambda: llm.eval([1]),
        llm.reset,
        llm.n_ctx,
        llm.n_vocab,
        lambda: llm.timings,
        lambda: llm.core_set,
        lambda: llm.score([1], [1]),
        llm.save_state,
        llm.__enter__,
    ):
        with pytest.raises(RuntimeError, match="this Llama is closed"):
            call()


def test_silent_unless_verbose(tiny, capfd):
    with load(tiny) as llm:
        llm("x", max_tokens=1)
    assert capfd.readouterr() == ("", "")
    with load(tiny, verbose=True) as llm:
        llm("x", max_tokens=1)
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "llama, 3 layers, context 256" in err


def test_two_objects_work_in_two_threads(tiny):
    with load(tiny, n_threads=1, core="stable") as llm:
        expected = [take(40, llm.generate([i, 5, 9], temp=0)) for i in range(2)]
    got: dict[int, list[int]] = {}

    def work(i: int) -> None:
        with load(tiny, n_threads=1, core="stable") as llm:
            got[i] = take(40, llm.generate([i, 5, 9], temp=0))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[0], got[1]] == expected


def test_one_object_refuses_a_second_caller_while_it_computes(tiny):
    seen: list[str] = []

    def meddle(done: int, total: int) -> None:
        try:
            llm.eval([1])
        except RuntimeError as error:
            seen.append(str(error))

    with load(tiny, prefill_progress=meddle) as llm:
        llm(PROMPT.decode(), max_tokens=1)
    assert seen and "computing, in another thread or in what called this" in seen[0]


def test_an_older_generation_does_not_go_on_in_a_newer_text(llm):
    older = llm.generate(PROMPT)
    next(older)
    next(llm.generate([1, 2, 3]))
    with pytest.raises(RuntimeError, match="the cache now holds another text"):
        next(older)


def test_prefill_progress_counts_to_the_end(tiny):
    seen = []
    with load(tiny, n_batch=16, prefill_progress=lambda *a: seen.append(a)) as llm:
        n = len(llm.tokenize(PROMPT))
        llm(PROMPT.decode(), max_tokens=1)
    assert seen[-1] == (n, n) and len(seen) == -(-n // 16)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_exception_in_a_callback_comes_out_and_leaves_the_object_usable(tiny):
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError("mine")

    with load(tiny, prefill_progress=fail) as llm:
        with pytest.raises(ZeroDivisionError, match="mine"):
            llm(PROMPT.decode(), max_tokens=1)
        llm.prefill_progress = None
        assert llm.n_tokens == 0 and len(take(3, llm.generate(PROMPT))) == 3


def interrupt_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_stops_decoding_and_leaves_the_object_usable(tiny):
    with load(tiny, n_ctx=100_000, core="stable") as llm:
        expected = take(5, llm.generate(PROMPT, temp=0))
        timer = interrupt_after(0.3)
        with pytest.raises(KeyboardInterrupt):
            for _ in llm.generate(PROMPT, temp=0):
                pass
        timer.join()
        assert take(5, llm.generate(PROMPT, temp=0)) == expected


def test_ctrl_c_stops_a_long_prefill_and_leaves_the_object_usable(smollm2_path):
    with Llama(smollm2_path, verbose=False) as llm:
        ids = np.random.default_rng(0).integers(5, 40_000, 4000)
        begun = time.monotonic()
        timer = interrupt_after(0.3)
        with pytest.raises(KeyboardInterrupt):
            llm.eval(ids)  # many seconds' work
        timer.join()
        stopped = time.monotonic() - begun
        assert llm.n_tokens == 0
        assert len(take(2, llm.generate("The capital of France is"))) == 2
        assert stopped < 5


def test_from_pretrained_asks_the_hub_for_the_one_file_that_fits(tiny, monkeypatch):
    hub = types.ModuleType("huggingface_hub")
    hub.list_repo_files = lambda repo: ["README.md", "model-q4.gguf", "model-q8.gguf"]
    asked = []

    def download(repo, name, local_dir, cache_dir):
        asked.append((repo, name, local_dir, cache_dir))
        return tiny

    hub.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with Llama.from_pretrained("a/b", "*q4.gguf", cache_dir="c", verbose=False, n_ctx=64) as llm:
        assert llm.n_ctx() == 64
    assert asked == [("a/b", "model-q4.gguf", None, "c")]
    with pytest.raises(ValueError, match="2 files of a/b fit"):
        Llama.from_pretrained("a/b", "*.gguf")
    with pytest.raises(ValueError, match="filename is None"):
        Llama.from_pretrained("a/b", None)


def test_an_object_says_what_it_is(tiny):
    with load(tiny, core="stable") as llm:
        llm.eval([1, 2, 3])
        assert repr(llm) == f"<Llama: {tiny}, core stable, 3 of 256 tokens>"
        next(llm.generate(PROMPT))
        llm.set_core_set(llm.core_set)
        assert "core <CoreSet: 3 layers, 4" in repr(llm)
    assert repr(llm).endswith(", closed>")


def test_what_llama_cpp_python_has_and_this_has_not_is_said(llm):
    with pytest.raises(AttributeError, match="has no attribute 'embed', which .*: coreinfer makes"):
        llm.embed("x")
    for name in ("pooling_type", "logits_to_logprobs", "create_chat_completion_openai_v1"):
        with pytest.raises(AttributeError, match=f"'{name}', which llama-cpp-python's has: "):
            getattr(llm, name)
    with pytest.raises(AttributeError, match="no attribute 'emebd'$"):
        llm.emebd("x")
    assert not hasattr(llm, "create_embedding")
