"""The command line: results on stdout, the rest on stderr, exit statuses, bad input."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coreinfer import CoreSet, Llama, models
from coreinfer.cli import main, progress
from coreinfer.cli.run import summary
from make_synthetic_model import make_tiny_model

PROMPT = "The river rose in the night, and by the morning the lower field was under water."
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
GREEDY = ["--temp", "0", "--threads", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    make_tiny_model(path, "llama", "Q8_0", extra_metadata={"tokenizer.chat_template": TEMPLATE})
    return str(path)


def usage_error(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def give_stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# --- run ---


def test_the_paper_s_preset_sets_what_other_flags_may_change(tiny, capsys):
    given = ["run", tiny, "-p", PROMPT, "--raw", "-n", "3", "--json", "--preset", "paper"]
    facts = []
    for more in ([], ["--beta", "0.25", "--statistic", "flock", "--layers", "1:"]):
        assert main([*given, *more, *GREEDY]) == 0
        facts.append(json.loads(capsys.readouterr().out)["core"])
    plain, changed = facts
    assert (plain["statistic"], plain["alpha"], plain["beta"]) == ("count", 0.4, 0.4)
    assert max(plain["sizes"]) == round(0.4 * 512)  # the first layer has no more than the others
    assert (changed["statistic"], changed["alpha"], changed["beta"]) == ("flock", 0.4, 0.25)
    assert changed["sizes"][1:] == [128, 128]
    with Llama(tiny, verbose=False, core="paper", f32_activations=True) as llm:
        llm(PROMPT, max_tokens=1)
        assert llm.core_set.patch_rank == 0 and plain["sizes"] == llm.core_set.sizes
    assert "invalid choice: 'papers'" in usage_error(capsys, *given[:-1], "papers")


def test_run_streams_the_text_and_summarises_on_stderr(tiny, capsys):
    assert main(["run", tiny, "-p", PROMPT, "--raw", "-n", "8", *GREEDY]) == 0
    out, err = capsys.readouterr()
    with Llama(tiny, verbose=False) as llm:
        assert out == llm(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"] + "\n"
    lines = dict(line.split(None, 1) for line in err.splitlines())
    assert list(lines)[:4] == ["backend", "prompt", "auto", "neurons"]
    assert list(lines)[-2:] == ["decode", "memory"]
    assert lines["auto"] == "exact: no tuning file"
    assert "all (dense)" in lines["neurons"] and "tok/s" in lines["prompt"]
    assert "GB/s" in lines["decode"] and re.fullmatch(
        r"\d+ MB now, \d+ MB at most", lines["memory"]
    )


def test_run_says_where_the_answer_ended_before_neurons_were_chosen(tiny, capsys, tmp_path):
    path = tmp_path / "core.npz"
    argv = ["run", tiny, "-p", PROMPT, "--raw", "--core", "stable", "--start", "6", *GREEDY]
    assert main([*argv, "-n", "6"]) == 0
    assert "all (dense: the answer ended within its first 6 tokens)" in capsys.readouterr().err
    assert main([*argv, "-n", "6", "--save-core", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out and "nothing was saved" in err and not path.exists()
    assert main([*argv, "-n", "9", "--save-core", str(path)]) == 0
    assert "kept" in capsys.readouterr().err and path.exists()


def test_run_says_where_drafts_do_not_pay(tiny, capsys):
    """So small a model's core step costs what a dense one does."""
    argv = ["run", tiny, "-p", PROMPT, "--raw", "--json", "-n", "60", *GREEDY]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["core"] is None and -1 <= facts["stability"] <= 1
    assert set(facts["drafting"]) == {"core", "text"}
    facts["drafting"]["core"]["gain"] = 1.0
    assert "would not pay here" in summary(facts)
    facts["drafting"]["core"]["gain"] = 1.3
    assert "would not pay" not in summary(facts)
    assert f"stability {facts['stability']:.2f}" in err


def test_run_applies_the_chat_template_unless_raw(tiny, capsys):
    main(["run", tiny, "-p", "hello", "--json", "-n", "1"])
    chat = json.loads(capsys.readouterr().out)
    main(["run", tiny, "-p", "hello", "--json", "-n", "1", "--raw"])
    raw = json.loads(capsys.readouterr().out)
    with Llama(tiny, verbose=False) as llm:
        assert chat["prompt_tokens"] == len(llm.tokenize(b"user: hello\nassistant:"))
        assert raw["prompt_tokens"] == len(llm.tokenize(b"hello"))


def test_run_prints_one_json_object(tiny, capsys):
    argv = ["run", tiny, "-p", PROMPT, "--json", "-n", "6", "--core", "stable", "--beta", "0.25"]
    assert main([*argv, *GREEDY]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert len(facts["ids"]) == 6 and facts["finish_reason"] == "length"
    assert facts["core"]["sizes"] == [256, 64, 64] and facts["core"]["kept"] == 0.25
    assert facts["core"]["statistic"] == "flock" and facts["core"]["beta"] == 0.25
    assert -1 <= facts["core"]["stability"] <= 1
    timings = facts["timings"]
    assert timings["decode_tokens"] == 5 and timings["decode_tokens_per_second"] > 0
    assert timings["decode_weight_bytes"] < timings["dense_weight_bytes"]
    assert 1e6 < timings["resident_bytes"] <= timings["peak_resident_bytes"]
    assert facts["backend"]["n_threads"] == 2
    assert "384 of 1536 kept (25 %)" in err and " -> " in err and "stability" in err


def test_run_reads_the_prompt_from_file_and_stdin(tiny, tmp_path, capsys, monkeypatch):
    options = ["--raw", "-n", "5", *GREEDY]
    main(["run", tiny, "-p", PROMPT, *options])
    expected = capsys.readouterr().out
    (tmp_path / "prompt.txt").write_text(PROMPT)
    main(["run", tiny, "-f", str(tmp_path / "prompt.txt"), *options])
    assert capsys.readouterr().out == expected
    give_stdin(monkeypatch, PROMPT.encode())
    main(["run", tiny, "-", *options])
    assert capsys.readouterr().out == expected


def test_run_stops_before_a_stop_string(tiny, capsys):
    main(["run", tiny, "-p", PROMPT, "--raw", "-n", "40", "--json", *GREEDY])
    text = json.loads(capsys.readouterr().out)["text"]
    stop = text[4:7]
    main(["run", tiny, "-p", PROMPT, "--raw", "-n", "40", "--json", "--stop", stop, *GREEDY])
    facts = json.loads(capsys.readouterr().out)
    assert facts["text"] == text[: text.index(stop)] and facts["finish_reason"] == "stop"


def test_run_saves_core_sets_and_takes_them_back(tiny, tmp_path, capsys):
    options = ["-p", PROMPT, "-n", "12", "--json", *GREEDY]
    file = str(tmp_path / "core.npz")
    main(["run", tiny, "--core", "stable", "--layers", "1:", "--save-core", file, *options])
    saved = json.loads(capsys.readouterr().out)
    core = CoreSet.load(file)
    assert core.layers[0] is None and core.sizes == saved["core"]["sizes"]
    main(["run", tiny, "--core-file", file, *options])
    assert json.loads(capsys.readouterr().out)["ids"] == saved["ids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of -p TEXT, -f FILE or -"),
        (["-p", "x", "-f", "y"], "one of -p TEXT, -f FILE or -"),
        (["hello"], "unrecognized argument 'hello'; give the prompt as -p TEXT"),
        (["-p", "x", "--beta", "0.5"], "--beta: no effect without --core stable"),
        (
            ["-p", "x", "--core", "stable", "--beta", "2"],
            r"--beta is 2.0; expected a number in (0,",
        ),
        (["-p", "x", "--core", "stable", "--layers", "5"], "--layers is '5'; expected FIRST:LAST"),
        (["-p", "x", "--core", "best"], "invalid choice: 'best'"),
        (["-p", "x", "--core", "stable", "--refresh", "0"], "--refresh is 0; expected an int"),
        (["-p", "x", "--core", "stable", "--refresh", "-1"], "--refresh is -1; expected an int"),
        (["-p", "x", "--core", "stable", "--refresh", "1.5"], "invalid int value: '1.5'"),
        (["-p", "x", "--core", "stable", "--core-file", "y"], "exclude each other"),
        (
            ["-p", "x", "--core", "exact", "--preset", "paper"],
            "--preset: no effect without --core stable or similar",
        ),
        (["-p", "x", "--save-core", "y"], "no core set without --core stable"),
        (["-p", "x", "--no-prior"], "--no-prior: no effect without --core stable or similar"),
        (
            ["-p", "x", "--core", "stable", "--tuning", "t"],
            "--tuning: no effect without --core auto",
        ),
        (["-p", "x", "--temp", "-1"], "--temp is -1.0; expected a number of at least 0"),
        (["-p", "x", "--ctx", "-5"], "--ctx is -5"),
        (["-p", "x", "--ctx", "9" * 20], "expected an integer in [0, 67108864]"),
        (["-p", "x", "--batch", "9" * 20], "expected an integer in [1, 65536]"),
        (["-p", "x", "--top-p", "0"], "--top-p is 0.0"),
        (["-p", "x", "--gpu-layers", "-2"], "--gpu-layers is -2"),
        (["-p", "x", "--threads", "two"], "invalid int value: 'two'"),
        (["-p", "x", "--stop", ""], "--stop is empty"),
        (["-p", "x", "--tem", "1"], "instead of --tem did you mean --temp?"),
        (["-p", "x", "--betta", "0.5"], "instead of --betta did you mean --beta?"),
        (["-p", "x", "--betta=0.5"], "instead of --betta=0.5 did you mean --beta?"),
        (["-p", "x", "--temprature", "1"], "instead of --temprature did you mean --temp?"),
        (["-p", "x", "--max-token", "1"], "instead of --max-token did you mean -n?"),
        (["-p", "x", "--n-threads", "1"], "instead of --n-threads did you mean --threads?"),
        (["-p", "x", "--zzzzz"], "unrecognized arguments: --zzzzz\n"),
        (["-p", "x", "--core-file", "f", "--start", "4"], "--start: no effect with --core-file, w"),
        (
            ["-p", "x", "--core-file", "f", "--clusters", "c", "--no-prior"],
            "--no-prior, --clusters: no effect with --core-file",
        ),
        (["-p", "x", "--core-file", "f", "--preset", "paper"], "--core-file and --preset exclude"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_flag(tiny, capsys, options, message):
    assert message in usage_error(capsys, "run", tiny, *options)


def test_a_command_is_needed(capsys):
    assert "a command is needed" in usage_error(capsys)
    assert "invalid choice: 'walk'" in usage_error(capsys, "walk")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "x " * 5000], "exceed context window of 256"),
        (["-p", ""], "the prompt is empty"),
        (["-f", "/nonexistent/prompt"], "No such file"),
        (["-p", "x", "--core", "stable", "--layers", "2:9"], "<= 3, the model's layers"),
        (
            ["-p", "x", "--core", "stable", "--beta", "1e-9"],
            "beta is 1e-09, which is less than one",
        ),
        (["-p", "x", "--core-file", "/nonexistent/core.npz"], "No such file"),
        (
            ["-p", "x", "--core", "stable", "--save-core", "/nonexistent/core.npz"],
            "cannot write /nonexistent/core.npz: there is no folder /nonexistent",
        ),
    ],
)
def test_runtime_errors_exit_with_1_and_one_line(tiny, capsys, options, message):
    assert main(["run", tiny, "--raw", "-n", "2", *options]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("coreinfer: error: ") and message in last


@pytest.mark.parametrize("chat", [[], ["--raw"]])
def test_an_empty_prompt_is_an_error_from_everywhere(tiny, tmp_path, capsys, monkeypatch, chat):
    (tmp_path / "empty.txt").touch()
    for source in (["-p", ""], ["-f", str(tmp_path / "empty.txt")], ["-"]):
        give_stdin(monkeypatch, b"")
        assert main(["run", tiny, *source, *chat, "-n", "2"]) == 1
        out, err = capsys.readouterr()
        assert out == "" and "the prompt is empty" in err


def test_the_answer_is_out_before_the_core_set_is_saved(tiny, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", full)
    argv = ["run", tiny, "-p", PROMPT, "--json", "-n", "2", "--core", "stable"]
    assert main([*argv, "--save-core", str(tmp_path / "core.npz")]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["ids"]) == 2 and "cannot save the core set: the disk" in err
    assert os.listdir(tmp_path) == []


def test_a_core_set_is_saved_over_nothing_that_was_read(tiny, tmp_path, capsys):
    before = Path(tiny).read_bytes()
    argv = ["run", tiny, "-n", "1", "--core", "stable", "-f", str(tmp_path / "prompt.txt")]
    (tmp_path / "prompt.txt").write_text("the river")
    for path in (tiny, tmp_path / "prompt.txt"):
        assert main([*argv, "--save-core", str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and "this command reads or writes it, too" in err
    assert Path(tiny).read_bytes() == before
    assert (tmp_path / "prompt.txt").read_text() == "the river"


def test_a_prompt_that_is_not_utf8_is_an_error(tiny, capsys, monkeypatch):
    give_stdin(monkeypatch, b"\xff\xfe")
    assert main(["run", tiny, "-"]) == 1
    assert "not UTF-8" in capsys.readouterr().err


def test_models_that_cannot_be_loaded_exit_with_1(tmp_path, capsys):
    assert main(["run", "smolm2", "-p", "x"]) == 1
    assert "did you mean 'smollm2'?" in capsys.readouterr().err
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    assert main(["run", str(tmp_path / "bad.gguf"), "-p", "x"]) == 1
    assert "coreinfer: error: " in capsys.readouterr().err


def test_no_bar_is_drawn_where_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", -1.0)
    monkeypatch.setattr(progress, "_INTERVAL", -1.0)
    line = progress.ProgressLine("reading", "tokens")
    line.update(1, 2)
    line.clear()
    assert capsys.readouterr() == ("", "")


def test_run_takes_the_likeliest_tokens_unless_told_otherwise(tiny, capsys):
    def ids(*options: str) -> list[int]:
        main(["run", tiny, "-p", PROMPT, "--raw", "-n", "20", "--json", *options])
        return json.loads(capsys.readouterr().out)["ids"]

    assert ids("--seed", "1") == ids("--seed", "2") == ids("--temp", "0")
    assert ids("--seed", "1", "--temp", "2") != ids("--seed", "2", "--temp", "2")


# --- info, tokenize, pull ---


def test_info_shows_what_a_file_holds(tiny, capsys):
    assert main(["info", tiny, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["n_layer"] == 3 and facts["config"]["n_ff"] == 512
    assert facts["chat_template"] is True and facts["unsupported"] == []
    assert facts["tensors"]["Q8_0"]["count"] > 0
    assert facts["metadata"]["tokenizer.ggml.tokens"]["length"] == 320
    assert main(["info", tiny]) == 0
    text = capsys.readouterr().out
    assert "llama, 3 layers" in text and "general.architecture" in text


def test_info_of_an_unsupported_architecture_shows_metadata_and_why(tmp_path, capsys):
    path = str(tmp_path / "strange.gguf")
    make_tiny_model(path, extra_metadata={"general.architecture": "mamba"})
    assert main(["info", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"] is None and facts["metadata"]["general.architecture"] == "mamba"
    assert any("mamba" in reason for reason in facts["unsupported"])
    assert main(["info", path]) == 0
    text = capsys.readouterr().out
    assert "unsupported" in text and "mamba" in text


def test_a_name_that_is_not_utf8_is_shown_and_does_no_harm(tmp_path, capsys):
    path = tmp_path / "latin1.gguf"
    make_tiny_model(path, extra_metadata={"general.name": "caf_"})
    path.write_bytes(path.read_bytes().replace(b"caf_", b"caf\xe9"))
    assert main(["run", str(path), "-p", PROMPT, "--raw", "-n", "1"]) == 0
    capsys.readouterr()
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["unsupported"] == [] and facts["metadata"]["general.name"] == "caf\ufffd"


def test_tokenize_prints_ids_and_tokens(tiny, capsys, monkeypatch):
    with Llama(tiny, verbose=False) as llm:
        ids = llm.tokenize("Hé\n".encode())
    assert main(["tokenize", tiny, "Hé\n", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ids"] == ids and len(facts["tokens"]) == len(ids)
    assert main(["tokenize", tiny, "Hé\n"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split("\t")[0]) for line in lines] == ids
    assert json.loads(lines[-1].split("\t")[1]) == "\n"
    give_stdin(monkeypatch, "Hé\n".encode())
    assert main(["tokenize", tiny, "-", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == ids


def test_a_warning_is_one_line_without_a_place_in_the_code(tiny, tmp_path, capsys):
    path = tmp_path / "nameless.gguf"
    path.write_bytes(Path(tiny).read_bytes().replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.per"))
    assert main(["tokenize", str(path), "x"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("coreinfer: warning: the file names no pre-tokenizer")
    assert err.count("\n") == 1


def test_tokenize_reads_control_tokens_when_asked(tiny, capsys):
    main(["tokenize", tiny, "<|eos|>", "--json", "--special"])
    special = json.loads(capsys.readouterr().out)
    main(["tokenize", tiny, "<|eos|>", "--json"])
    plain = json.loads(capsys.readouterr().out)
    assert special["tokens"] == ["<|eos|>"] and len(plain["ids"]) > 1


def test_pull_prints_the_path_alone_on_stdout(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path))
    row = models.KNOWN_MODELS["smollm2"]
    path = tmp_path / row.filename
    with open(path, "wb") as file:  # as large as the real one, without its bytes
        file.truncate(row.n_bytes)
    assert main(["pull", "smollm2"]) == 0
    assert capsys.readouterr() == (f"{path}\n", "")
    assert main(["pull", "nothing"]) == 1
    assert "known models: smollm2" in capsys.readouterr().err


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


# --- as a process ---


def start(*argv: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "coreinfer", *argv], **options)


@pytest.mark.parametrize(
    ("redirection", "arguments", "message"),
    [
        (">&-", "run {model} -p x -n 1", b"stdout is closed"),
        (">&-", "info {model}", b"stdout is closed"),
        ("<&-", "run {model} - -n 1", b"stdin is closed"),
        ("<&-", "tokenize {model} -", b"stdin is closed"),
    ],
)
def test_closed_streams_are_one_line_on_stderr(tiny, redirection, arguments, message):
    line = f"{sys.executable} -m coreinfer {arguments.format(model=tiny)} {redirection}"
    done = subprocess.run(line, shell=True, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["--help", "run --help", "--version", "info {model}"])
def test_a_full_disk_is_one_line_on_stderr_and_an_error(tiny, arguments, unbuffered):
    argv = [sys.executable, "-m", "coreinfer", *arguments.format(model=tiny).split()]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, env=env, timeout=60)
    assert done.returncode == 1
    assert done.stderr == b"coreinfer: error: [Errno 28] No space left on device\n"


def test_a_closed_stderr_costs_nothing_but_the_summary(tiny):
    line = f"{sys.executable} -m coreinfer run {tiny} -p x -n 1 --json 2>&-"
    done = subprocess.run(line, shell=True, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0 and len(json.loads(done.stdout)["ids"]) == 1


def test_an_ascii_terminal_gets_escapes_instead_of_nothing(tiny):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    process = start("tokenize", tiny, "Hé", "--special", stdout=subprocess.PIPE, env=env)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out.isascii() and out.count(b"\n") >= 2


def test_models_whose_path_is_not_utf8_work(tiny, tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff.gguf"
    os.symlink(tiny, odd)
    for command in (["info"], ["info", "--json"], ["run", "-p", "x", "-n", "1", "--json"]):
        argv = [sys.executable, "-m", "coreinfer", command[0], odd, *command[1:]]
        done = subprocess.run(argv, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert b"udcff" in done.stdout
    done = subprocess.run([sys.executable, "-m", "coreinfer", "tokenize", odd, "x"], timeout=60)
    assert done.returncode == 0


def test_ctrl_c_exits_with_130_and_without_a_traceback(tmp_path):
    path = str(tmp_path / "long.gguf")
    make_tiny_model(path, "llama", "F32", n_ctx=100_000)
    process = start(
        *("run", path, "-p", PROMPT, "-n", "0", "--temp", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(1)  # it writes, so it decodes
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_reader_that_goes_away_ends_the_run_quietly(tmp_path):
    path = str(tmp_path / "long.gguf")
    make_tiny_model(path, "llama", "F32", n_ctx=100_000)
    process = start(
        *("run", path, "-p", PROMPT, "-n", "0", "--temp", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert err == b""


def test_a_long_prefill_draws_a_bar_on_a_terminal_and_takes_it_away(smollm2_path, tmp_path):
    (tmp_path / "prompt.txt").write_text("The river rose. " * 240)
    primary, secondary = pty.openpty()
    process = start(
        *("run", str(smollm2_path), "-f", str(tmp_path / "prompt.txt"), "-n", "2", "--raw"),
        *("--batch", "1"),  # slow enough for a bar on any machine
        stdout=subprocess.PIPE,
        stderr=secondary,
    )
    os.close(secondary)
    seen, begun = b"", time.monotonic()
    while time.monotonic() - begun < 120:
        try:
            data = os.read(primary, 4096)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        seen += data
    out = process.stdout.read()
    assert process.wait(timeout=60) == 0
    os.close(primary)
    assert b"reading the prompt [#" in seen
    assert seen.rindex(b"\x1b[2K") > seen.rindex(b"reading the prompt")
    assert b"reading" not in out
