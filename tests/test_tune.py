"""`coreinfer tune` keeps what it measured, and measures each prompt as a text of its own."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from coreinfer import CoreConfig, Llama
from coreinfer.cli import main, tune
from coreinfer.tuning import Tuning, cut, measure, tuning_path
from make_synthetic_model import make_tiny_model
from measured_texts import cut_prompts

SMALL = ["--prompts", "32", "--texts", "2", "-n", "6", "--betas", "0.5,0.9"]


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "tiny.gguf"
    make_tiny_model(path, "llama", "Q8_0")
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words of a text that repeats " * 30)
    return str(path)


# --- files ---


def test_a_plot_is_a_png_beside_what_was_measured(model, text, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    assert main(["tune", str(model), "--text", text, "--plot", str(plot), *SMALL]) == 0
    data = plot.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xae\x42\x60\x82")
    assert len(Tuning.load(tuning_path(model)).rows) == 2
    names = {"tiny.gguf", "tiny.gguf.tuning.json", "text.txt", "plot.png"}
    assert set(os.listdir(tmp_path)) == names


def test_what_was_measured_is_kept_where_the_plot_fails(model, text, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def fails(*_):
        raise OSError("the disk of plots is full")

    monkeypatch.setattr(tune, "draw", fails)
    plot = str(tmp_path / "plot.png")
    assert main(["tune", str(model), "--text", text, "--plot", plot, *SMALL]) == 1
    out, err = capsys.readouterr()
    assert "the disk of plots is full" in err and "| 32 | 0.8 | flock " in out
    assert len(Tuning.load(tuning_path(model)).rows) == 2


def test_a_table_is_shown_where_its_file_cannot_be_saved(model, text, monkeypatch, capsys):
    def fails(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(Tuning, "save", fails)
    assert main(["tune", str(model), "--text", text, *SMALL]) == 1
    out, err = capsys.readouterr()
    assert "the disk is full" in err and "| 32 | 0.8 | flock " in out


@pytest.fixture
def no_model(monkeypatch):
    """Whatever is wrong is to be said before a model is even looked for."""

    def resolve(_):
        raise AssertionError("the model was asked for")

    monkeypatch.setattr(tune, "resolve", resolve)


def test_without_matplotlib_the_extra_is_named_before_the_work(text, no_model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["tune", "model", "--text", text, "--plot", "plot.png"]) == 1
    assert "pip install 'coreinfer-cpp[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--out", "--plot"])
def test_a_file_that_cannot_be_written_is_said_before_the_work(
    flag, text, no_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", sys)  # not needed to say this
    given = ["tune", "model", "--text", text, flag]
    assert main([*given, str(tmp_path / "none" / "f")]) == 1
    assert "f: there is no folder" in capsys.readouterr().err
    assert main([*given, str(tmp_path)]) == 1
    assert "it is a folder" in capsys.readouterr().err


def test_what_is_read_or_written_is_not_written_over(model, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", sys)  # not needed to say this
    monkeypatch.setattr(tune, "measure", lambda *_, **__: pytest.fail("measured"))
    clusters, new = str(tmp_path / "c.npz"), str(tmp_path / "new")
    given = ["tune", str(model), "--text", text, "--clusters", clusters]
    beside = str(tuning_path(model))
    for path in (str(model), text, clusters):
        for flags in (["--out", path], ["--plot", path]):
            assert main([*given, *flags]) == 1
            assert f"cannot write {path}: this command reads" in capsys.readouterr().err
    for flags in (["--out", new, "--plot", new], ["--plot", beside]):
        monkeypatch.setattr(tune, "_figure", lambda: None)
        assert main([*given, *flags]) == 1
        assert f"cannot write {flags[-1]}: this command reads" in capsys.readouterr().err
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main([*given, "--out", str(pipe)]) == 1
    assert "it is no regular file" in capsys.readouterr().err


def test_a_text_that_is_not_utf8_is_said_before_the_work(no_model, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes("die Brücke ".encode("latin-1") * 99)
    assert main(["tune", "model", "--text", str(tmp_path / "text.txt")]) == 1
    assert "text.txt: not UTF-8: " in capsys.readouterr().err


def test_a_model_s_folder_that_may_not_be_written_to_is_said_before_the_work(
    model, text, monkeypatch, capsys
):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    monkeypatch.setattr(tune, "measure", lambda *_, **__: pytest.fail("measured"))
    assert main(["tune", str(model), "--text", text]) == 1
    err = capsys.readouterr().err
    assert "tuning.json: the folder" in err and "may not be written to; give --out" in err


# --- prompts ---


def test_every_prompt_of_a_text_begins_as_a_text_does():
    ids = np.arange(100, dtype=np.int32)
    cuts = cut(ids, 10, 4, bos=7)
    assert [len(c) for c in cuts] == [10] * 4
    assert [c[:2].tolist() for c in cuts] == [[7, 0], [7, 30], [7, 60], [7, 91]]
    assert [len(c) for c in cut(ids, 101, 4, bos=7)] == [101]
    with pytest.raises(ValueError, match="101 tokens; expected at least 102"):
        cut(ids, 102, 1, bos=7)


def test_what_leaves_no_room_for_an_answer_is_not_measured(model, text, capsys):
    asked = ["tune", str(model), "--text", text, *SMALL[2:]]  # a context of 256 tokens
    assert main([*asked, "--prompts", "251,256"]) == 1
    error = "prompts of 251 tokens and answers of 6 do not fit the context of 256; expected shorter"
    assert error in capsys.readouterr().err and not tuning_path(model).exists()
    assert main([*asked, "--prompts", "250,251,9999"]) == 0
    assert "prompts of 251, 9999 tokens were left out" in capsys.readouterr().err
    assert {row.n_prompt for row in Tuning.load(tuning_path(model)).rows} == {250}
    assert main([*asked, "--prompts", "246,247", "--starts", "0,4"]) == 0
    assert "left out: the text has fewer, or the context has no room for them and 10 of" in (
        capsys.readouterr().err
    )
    assert main([*asked, "--prompts", "250"]) == 0
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"n_answer": 1}, "n_answer is 1; expected at least 2"),
        ({"n_texts": 0}, "n_texts is 0; expected at least 1"),
        ({"n_prompts": (8, 0)}, "n_prompts is 0; expected at least 1"),
        ({"n_prompts": ()}, "n_prompts is 0; expected at least 1"),
        ({"configs": [CoreConfig(mode="exact")]}, "mode is 'exact'; expected stable or similar"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, asked, error):
    ids = np.arange(100, dtype=np.int32)
    with Llama(str(model), verbose=False) as llm, pytest.raises(ValueError, match=error):
        next(measure(llm, ids, **{"configs": [CoreConfig()], "n_prompts": (8,), **asked}))


@pytest.mark.parametrize("add_bos", [True, False])
def test_tune_s_prompts_have_bos_where_the_tokenizer_adds_one(add_bos, text, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    make_tiny_model(path, "llama", "Q8_0", extra_metadata={"tokenizer.ggml.add_bos_token": add_bos})
    seen = []
    generate = Llama.generate_ids

    def spy(self, prompt, *rest, **more):
        seen.append(np.array(prompt))
        return generate(self, prompt, *rest, **more)

    monkeypatch.setattr(Llama, "generate_ids", spy)
    assert main(["tune", str(path), "--text", text, *SMALL, "--prompts", "32,48"]) == 0
    with Llama(str(path), verbose=False) as llm:
        bos = llm.token_bos()
        again = cut_prompts(llm, ["some words of a text", "a"], 8, 2)
    assert len(seen) == 2 * 2 * 3 and {len(p) for p in seen} == {32, 48}
    assert {bool(p[0] == bos) for p in seen} == {add_bos}
    assert not any((p[1:] == bos).any() for p in seen)
    (prompt,) = again
    assert len(prompt) == 8 and (prompt[0] == bos) == add_bos


# --- settings ---


def test_every_axis_is_measured_with_every_other(model, text, capsys):
    axes = ["--statistics", "count,flock", "--weighted", "off,on", "--layers", "1:"]
    axes += ["--first-layers", "1,2", "--patches", "off,8", "--starts", "0,3", "--temps", "0,1"]
    asked = ["--prompts", "16", "--texts", "2", "-n", "2", "--betas", "0.5,0.9", *axes]
    assert main(["tune", str(model), "--text", text, *asked]) == 0
    rows = Tuning.load(tuning_path(model)).rows
    names = ("statistic", "weighted", "layers", "first_layer", "patch", "start", "beta")
    settings = {tuple(getattr(row.config, name) for name in names) for row in rows}
    assert 2 * len(settings) == len(rows) == 2**8
    assert {row.temperature for row in rows} == {0.0, 1.0}
    assert ("flock", True, (1, None), 2.0, 8, 3, 0.9) in settings
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.split("|")[4].strip() == "weighted"
    assert {line.split("|")[4].strip() for line in lines} == {"on", "off"}
    assert {line.split("|")[5].strip() for line in lines} == {"all", "1:"}


def test_what_is_asked_for_twice_is_measured_once(model, text, capsys):
    asked = ["--prompts", "16,16", "--texts", "2", "-n", "4", "--betas", "0.4,0.40"]
    asked += ["--patches", "on,64", "--temps", "0,0"]
    assert main(["tune", str(model), "--text", text, *asked]) == 0
    assert len(Tuning.load(tuning_path(model)).rows) == 1
    assert capsys.readouterr().err.count("within KL 0.05 at temperature 0: ") == 1


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--betas", "0.5,2"], "--betas is 2.0; expected"),
        (["--statistics", "best"], "--statistics is 'best'; expected"),
        (["--first-layers", "0"], "--first-layers is 0.0; expected"),
        (["--patches", "x"], "--patches is 'x'; expected"),
        (["--starts", "0,-1"], "--starts is -1; expected"),
        (["--temps", "0,-1"], "--temps is -1.0; expected"),
        (["--clusters", "c", "--gammas", "nan"], "--gammas is nan; expected"),
        (["--gammas", "0.5"], "--gammas: no effect without --clusters"),
        (["--embedder", "e"], "--embedder: no effect without --clusters"),
    ],
)
def test_wrong_usage_names_a_flag_that_there_is(flags, error, text, no_model, capsys):
    with pytest.raises(SystemExit):
        main(["tune", "model", "--text", text, *flags])
    assert error in capsys.readouterr().err


def test_a_flag_that_is_like_none_is_given_no_other(text, capsys):
    """The dashes that all flags begin with make them no more alike."""
    with pytest.raises(SystemExit):
        main(["tune", "model", "--text", text, "--lengths", "64"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --lengths 64\n")


def test_a_weighting_that_is_neither_on_nor_off_is_a_usage_error(text, capsys):
    with pytest.raises(SystemExit):
        main(["tune", "model", "--text", text, "--weighted", "off,yes"])
    assert "--weighted: 'yes' is neither on nor off" in capsys.readouterr().err
