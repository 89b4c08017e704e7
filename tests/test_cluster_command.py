"""`coreinfer cluster`: build, info, and runs with what it made."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coreinfer import Clusters, Llama
from coreinfer.cli import main, tune
from coreinfer.embedders import DEFAULT_EMBEDDER
from coreinfer.tuning import Tuning
from small_clusters import RIVER, make_tiny_chat, write_texts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return make_tiny_chat(tmp_path_factory.mktemp("clusters") / "tiny.gguf")


@pytest.fixture
def data(tmp_path) -> str:
    return write_texts(tmp_path / "texts.jsonl", "question")


def build(model: str, data: str, out, *options: str) -> int:
    argv = ["cluster", "build", model, "--data", data, "--field", "question", "--out", str(out)]
    return main([*argv, *options])


def test_build_info_and_run_from_the_command_line(
    tiny, data, tmp_path, capsys, sentence_transformers
):
    out = tmp_path / "c.npz"
    assert build(tiny, data, out, "--embedder", "some/letters", "--clusters", "2", "--raw") == 0
    assert capsys.readouterr() == ("", f"{out}: 2 clusters of 8 texts\n")
    assert main(["cluster", "info", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["n_texts"] == [4, 4] and facts["embedder"] == "some/letters"
    assert (facts["n_features"], facts["statistic"], facts["chat"]) == (27, "flock", False)
    assert facts["weighted"] is False
    assert main(["cluster", "info", str(out)]) == 0
    assert "embeddings of some/letters, 27 dimensions" in capsys.readouterr().out
    run = ["run", tiny, "-p", RIVER[0], "-n", "4", "--core", "similar", "--clusters", str(out)]
    assert main([*run, "--gamma", "0.25", "--json"]) == 0
    answer, summary = capsys.readouterr()
    facts = json.loads(answer)
    assert facts["core"]["kept"] == 0.25 and facts["clusters"] == 2
    # The prompt's own text is compared, not what the chat template makes of it.
    assert facts["core"]["cluster_similarity"] > 0.9
    assert facts["timings"]["lookup_seconds"] > 0
    assert f"cluster  {facts['core']['cluster']} of 2, similarity 0.9" in summary


def test_the_paper_s_settings_with_clusters(tiny, data, tmp_path, capsys):
    out = tmp_path / "c.npz"
    counted = ("--statistic", "count", "--patch-rows", "0")
    assert build(tiny, data, out, "--by", "neurons", "--clusters", "2", *counted) == 0
    capsys.readouterr()
    run = ["run", tiny, "-p", RIVER[0], "-n", "2", "--preset", "paper", "--core", "similar"]
    assert main([*run, "--clusters", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["core"]
    assert (facts["statistic"], facts["beta"], facts["patch_rank"]) == ("count", 0.4, 0)
    assert len(set(facts["sizes"])) == 1 and facts["cluster"] is not None
    with Llama(tiny, preset="paper", core="similar", clusters=out, gamma=0.2, verbose=False) as llm:
        llm(RIVER[0], max_tokens=1)
        assert llm.core_set.kept < 0.21 and llm.core_set.patch_rank == 0


def test_build_by_neurons_reads_texts_through_the_chat_template(tiny, data, tmp_path, capsys):
    options = ("--by", "neurons", "--clusters", "2", "--limit", "6", "--beta", "0.3", "--weighted")
    assert build(tiny, data, tmp_path / "c.npz", *options) == 0
    clusters = Clusters.load(tmp_path / "c.npz")
    assert (clusters.by, clusters.beta, clusters.embedder) == ("neurons", 0.3, "")
    assert clusters.chat and clusters.n_texts.sum() == 6
    assert main(["cluster", "info", str(tmp_path / "c.npz")]) == 0
    said = capsys.readouterr().out
    assert "30 % of neurons" in said and "counted    flock, weighted, alpha 0.4, through" in said
    assert clusters.weighted


def test_tune_measures_clusters_and_says_which_prompts_they_are_for(
    tiny, data, tmp_path, capsys, monkeypatch
):
    clusters, out, text = tmp_path / "c.npz", tmp_path / "t.json", tmp_path / "text.txt"
    assert build(tiny, data, clusters, "--by", "neurons", "--clusters", "2", "--raw") == 0
    text.write_text("the river rose again in the night and fell " * 20)
    measure = tune.measure

    def fast(*args, **options):
        return (replace(row, speed=2.0) for row in measure(*args, **options))

    monkeypatch.setattr(tune, "measure", fast)
    capsys.readouterr()
    asked = f"--clusters {clusters} --gammas 0.9 --betas 0.8 --prompts 32 --texts 2 -n 4"
    more = ["--text", str(text), "--out", str(out), "--max-kl", "9"]
    assert main(["tune", tiny, *asked.split(), *more]) == 0
    own, by_cluster = Tuning.load(out).rows
    assert own.cluster_similarity is None and by_cluster.config.gamma == 0.9
    near = f"{by_cluster.cluster_similarity:.2f}"
    said = capsys.readouterr().err
    assert f"0.9 of the cluster's neurons from 32 prompt tokens and similarity {near} on" in said
    assert "0.8 of the prompt's neurons from 32 prompt tokens on" in said


def test_the_same_seed_builds_the_same_file(tiny, data, tmp_path):
    for name in ("a.npz", "b.npz"):
        assert build(tiny, data, tmp_path / name, "--by", "neurons", "--seed", "7") == 0
    a, b = Clusters.load(tmp_path / "a.npz"), Clusters.load(tmp_path / "b.npz")
    assert np.array_equal(a.centroids, b.centroids)
    assert all(np.array_equal(x, y) for x, y in zip(a.scores, b.scores, strict=True))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "the file holds no text"),
        ("\n\n", "the file holds no text"),
        ('{"question": "a"}\nnothing\n', "line 2: not JSON"),
        ('{"question": "a"}\n{"answer": "b"}\n', "line 2: there is no field 'question' (answer)"),
        ("[1]\n", "line 1: there is no field 'question' (it is no object)"),
        ('{"question": 5}\n', "line 1: question is 5; expected some text"),
        ('{"question": " "}\n', "line 1: question is ' '; expected some text"),
        ('{"question": "a"}\n{"question": "\\ud800"}\n', "line 2: question is no valid text: "),
        (json.dumps(dict.fromkeys(map(str, range(999)))), "no field 'question' (0, 1, 2, 3, 4, 5"),
        ('{"question": "a"}\n', "1 texts to cluster"),
    ],
)
def test_data_that_is_not_texts_is_an_error_with_its_line(tiny, tmp_path, capsys, lines, message):
    (tmp_path / "bad.jsonl").write_text(lines)
    assert build(tiny, str(tmp_path / "bad.jsonl"), tmp_path / "c.npz", "--by", "neurons") == 1
    said = capsys.readouterr().err
    assert message in said and len(said) < 500
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_a_folder_that_is_not_there_is_said_before_the_work(tiny, data, tmp_path, capsys):
    assert build("no model at all", data, tmp_path / "none" / "c.npz") == 1
    assert "there is no folder" in capsys.readouterr().err


def test_what_is_read_is_not_written_over(tiny, data, tmp_path, capsys):
    (tmp_path / "link.npz").symlink_to(data)
    before = [Path(path).read_bytes() for path in (tiny, data)]
    for out in (tiny, data, tmp_path / "none" / ".." / "texts.jsonl", tmp_path / "link.npz"):
        assert build(tiny, data, out, "--by", "neurons") == 1
        assert "this command reads or writes it, too" in capsys.readouterr().err
    assert [Path(path).read_bytes() for path in (tiny, data)] == before


def test_without_a_name_the_default_embedder_is_loaded(tiny, data, tmp_path, sentence_transformers):
    assert build(tiny, data, tmp_path / "c.npz", "--clusters", "2") == 0
    assert sentence_transformers == [DEFAULT_EMBEDDER]


def test_ctrl_c_leaves_no_file(tiny, data, tmp_path, capsys, monkeypatch):
    reads = []

    def interrupted(self, done, total):
        reads.append(done)
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("coreinfer.cli.progress.ProgressLine.__call__", interrupted)
    assert build(tiny, data, tmp_path / "c.npz", "--by", "neurons") == 130
    assert reads == [1, 2, 3]
    assert os.listdir(tmp_path) == ["texts.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cluster"], "the following arguments are required: ACTION"),
        (["cluster", "build", "m", "--data", "d", "--field", "f"], "required: --out"),
        (
            "cluster build m --data d --field f --out o --clusters many".split(),
            "'many'; expected a positive integer",
        ),
        (
            "cluster build m --data d --field f --out o --limit 0".split(),
            "'0'; expected a positive",
        ),
        (
            "cluster build m --data d --field f --out o --beta 0.2".split(),
            "--beta: no effect without --by neurons",
        ),
        (
            "cluster build m --data d --field f --out o --by neurons --beta 2".split(),
            "--beta is 2.0; expected a number in (0, 1]",
        ),
        (
            "cluster build m --data d --field f --out o --by neurons --embedder e".split(),
            "--embedder: no effect without --by embedding",
        ),
        (
            "cluster build m --data d --field f --out o --seed 4294967296".split(),
            "--seed is 4294967296; expected an integer from 0 to 4294967295",
        ),
        ("run m -p x --core similar".split(), "--core similar needs --clusters FILE"),
        ("run m -p x --core off --clusters c".split(), "--clusters: no effect without --core"),
        ("run m -p x --core stable --embedder e".split(), "--embedder: no effect without --core"),
        (
            "run m -p x --core stable --gamma 0.2".split(),
            "--gamma: no effect without --core similar",
        ),
        (
            "run m -p x --core similar --clusters c --beta 0.2".split(),
            "--beta: no effect without --core stable",
        ),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_flag(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
