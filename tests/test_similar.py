"""Decoding with a cluster's neurons: building, lookup, blending, the prior of the patch."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import shutil
import sys
import tempfile
import traceback
from dataclasses import replace

import numpy as np
import pytest

import measure_patch
import measure_refresh
import measure_similarity
from coreinfer import (
    Clusters,
    CoreConfig,
    CoreSet,
    Llama,
    _core,
    build_clusters,
)
from coreinfer.cluster_lookup import core_neurons
from coreinfer.embedders import Embedder, as_embedder
from coreinfer.tuning import Row, Tuning, cut, measure
from make_synthetic_model import make_tiny_model
from measured_texts import compare, cut_prompts
from reference.neurons import core_sizes
from small_clusters import (
    NUMBERS,
    RIVER,
    TEXTS,
    letters,
    make_clusters,
    make_clusters_by_neurons,
    make_prior,
    make_tiny_chat,
    write_texts,
)
from tiny_llama import load


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return make_tiny_chat(tmp_path_factory.mktemp("clusters") / "tiny.gguf")


@pytest.fixture(scope="module")
def built(tiny) -> Clusters:
    with load(tiny) as llm:
        return build_clusters(llm, TEXTS, embedder=letters, n_clusters=2, random_state=0)


def embedded(clusters: Clusters, **options):
    """Options of a model: clusters by neurons take no embedder."""
    embedder = None if clusters.by == "neurons" else letters
    return {"clusters": clusters, "embedder": embedder, **options}


@pytest.fixture(scope="module")
def by_neurons(tiny) -> Clusters:
    with load(tiny) as llm:
        return build_clusters(llm, TEXTS, by="neurons", n_clusters=2, beta=0.2, random_state=0)


def expected_set(clusters: Clusters, cluster: int, gamma: float) -> CoreSet:
    sizes = core_sizes(gamma, clusters.n_layer, clusters.n_ff, CoreConfig.first_layer)
    layers = [
        np.sort(np.argsort(-layer[cluster])[:k])
        for layer, k in zip(clusters.scores, sizes, strict=True)
    ]
    return CoreSet(layers=layers, n_ff=clusters.n_ff)


def test_build_averages_the_scores_per_token_of_a_clusters_texts(tiny, built):
    assert built.n_clusters == 2 and built.n_texts.tolist() == [4, 4]
    with load(tiny) as llm:
        cluster, similarity = built.nearest(letters(RIVER)[0])
        own = np.mean([llm.neuron_scores(llm.prompt_ids(text)) for text in RIVER], axis=0)
        np.testing.assert_allclose(
            np.stack([layer[cluster] for layer in built.scores]), own, rtol=1e-4, atol=1e-7
        )
        assert built.fingerprint == llm.fingerprint
    assert similarity > 0.9
    # Each token's flock scores add up to 1.
    np.testing.assert_allclose([layer.sum(axis=1) for layer in built.scores], 1, rtol=1e-3)


@pytest.fixture(scope="module")
def weighted(tiny) -> Clusters:
    with load(tiny) as llm:
        return build_clusters(
            llm, TEXTS, embedder=letters, n_clusters=2, weighted=True, random_state=0
        )


def test_weighted_clusters_are_built_and_blended_of_what_neurons_write(tiny, built, weighted):
    assert weighted.weighted and not built.weighted
    prompt = TEXTS[0]
    cluster, _ = weighted.nearest(letters(RIVER)[0])
    of_cluster = np.stack([layer[cluster] for layer in weighted.scores])
    core = CoreConfig(mode="similar", gamma=0.25, blend=0.5)
    with load(tiny, core=core, clusters=weighted, embedder=letters) as llm:
        llm(prompt, max_tokens=2)
        chosen = llm.core_set
        ids = llm.prompt_ids(prompt)
        plain = llm.neuron_scores(ids)
        own = llm.neuron_scores(ids, weighted=True)
        expected = np.mean(
            [llm.neuron_scores(llm.prompt_ids(text), weighted=True) for text in RIVER], axis=0
        )
    assert np.abs(own - plain).max() > 1e-4
    np.testing.assert_allclose(of_cluster, expected, rtol=1e-4, atol=1e-7)
    assert chosen.weighted and chosen.cluster == cluster
    blended = (own + of_cluster) / 2
    np.testing.assert_allclose(np.stack(chosen.scores), blended, rtol=1e-3, atol=1e-6)


def test_the_weighting_is_that_of_the_clusters(tiny, weighted):
    with pytest.raises(ValueError, match="weighted is True; it needs core='stable' or core='ex"):
        CoreConfig(mode="similar", weighted=True)
    with load(tiny, core="similar", clusters=weighted, embedder=letters) as llm:
        llm(TEXTS[0], max_tokens=2)
        assert llm.core_set.weighted


def test_similar_decodes_with_the_neurons_of_the_nearest_cluster(tiny, built):
    core = CoreConfig(mode="similar", gamma=0.25, blend=0, patch=False)
    with load(tiny, core=core, clusters=built, embedder=letters) as llm:
        for text in ("the night again", "4 and 5"):
            text_of_similar = llm(text, max_tokens=6, temperature=0)["choices"][0]["text"]
            core, timings = llm.core_set, llm.timings
            cluster, similarity = built.nearest(letters([text])[0])
            assert (core.cluster, core.cluster_similarity) == (cluster, similarity)
            assert core.same_neurons(expected_set(built, cluster, 0.25))
            assert core.beta == 0.25 and core.fingerprint == llm.fingerprint
            assert core.stability is None and timings.count_seconds == 0
            assert timings.embed_seconds > 0 and timings.lookup_seconds > 0
            llm.core = core
            assert llm(text, max_tokens=6, temperature=0)["choices"][0]["text"] == text_of_similar
            assert llm.timings.embed_seconds == llm.timings.lookup_seconds == 0
            llm.core = CoreConfig(mode="similar", gamma=0.25, blend=0, patch=False)


def test_a_cluster_s_neurons_are_patched_for_the_prompt(tiny, built):
    with load(tiny, core="similar", clusters=built, embedder=letters, patch=4) as llm:
        llm("the night again", max_tokens=2)
        assert llm.core_set.patch_rank == 4 and llm.core_set.cluster is not None
        assert llm.timings.patch_bytes > 0


def test_auto_decodes_with_a_cluster_that_was_measured(tiny, built):
    config = CoreConfig(mode="similar", gamma=0.9)
    ids = np.random.default_rng(0).integers(0, 256, 200, dtype=np.int32)
    with load(tiny, clusters=built, embedder=letters) as llm:
        row = next(iter(measure(llm, ids, [config], n_prompts=(8,), n_texts=2, n_answer=4)))
        fingerprint = llm.fingerprint
    assert row.clusters == built.digest and row.kl > 0
    figures = {"kl": 0.01, "kl_error": 0.0, "speed": 1.2, "choosing": 0.0}
    tuning = Tuning(fingerprint, (dataclasses.replace(row, **figures),))
    options = {"clusters": built, "embedder": letters, "core": "auto", "tuning": tuning}
    with load(tiny, **options) as llm:
        llm("the night again and again", max_tokens=3)
        assert llm.decision.config == config and llm.decision.kl == 0.01
        assert llm.core_set.cluster is not None
        llm.set_clusters(None)
        llm("the night again and again", max_tokens=3)
        assert llm.decision.config.mode == "exact" and llm.core_set is None


def tuned(tiny, clusters: Clusters, similarity: float, n_prompt: int = 8) -> Tuning:
    config = CoreConfig(mode="similar", gamma=0.9)
    figures = {"agreement": 0.9, "stability": 0.0, "weight_share": 0.9, "speed": 1.2}
    row = Row(config, n_prompt, 0.01, 0.0, **figures, clusters=clusters.digest,
              cluster_similarity=similarity)  # fmt: skip
    with load(tiny) as llm:
        return Tuning(llm.fingerprint, (row,))


def test_tune_measures_how_near_prompts_are_to_their_clusters(tiny, built):
    ids = np.random.default_rng(0).integers(97, 123, 200, dtype=np.int32)
    with load(tiny, clusters=built, embedder=letters) as llm:
        configs = [CoreConfig(mode="similar", gamma=0.9), CoreConfig(beta=0.9)]
        rows = list(measure(llm, ids, configs, n_prompts=(24,), n_texts=3, n_answer=4))
        prompts = cut(ids, 24, 3)
        cosines = [built.nearest(letters([llm._text(p)])[0])[1] for p in prompts]
    assert len(set(cosines)) == 3 and rows[0].cluster_similarity == min(cosines)
    assert rows[1].cluster_similarity is None


@pytest.mark.parametrize("kind", ["built", "by_neurons"])
def test_auto_takes_a_cluster_only_for_prompts_as_near_as_those_measured(tiny, kind, request):
    clusters = request.getfixturevalue(kind)
    prompt = "the night again and again"
    with load(tiny, core="similar", **embedded(clusters)) as llm:
        llm(prompt, max_tokens=2)
        similarity = llm.core_set.cluster_similarity
    options = embedded(clusters, core="auto")
    with load(tiny, **options, tuning=tuned(tiny, clusters, similarity)) as llm:
        llm(prompt, max_tokens=3)
        assert llm.decision.config.mode == "similar"
        assert llm.core_set.cluster_similarity == similarity
    with load(tiny, **options, tuning=tuned(tiny, clusters, min(1, similarity + 1e-3))) as llm:
        llm(prompt, max_tokens=3)
        assert llm.decision.config.mode == "exact" and llm.core_set is None
        assert "cluster similarity" in llm.decision.reason
        assert llm.timings.lookup_seconds > 0  # it was looked up


def test_auto_is_exact_before_a_cluster_that_needs_nothing_counted(tiny, built):
    tuning = tuned(tiny, built, -1.0, n_prompt=24)
    plain = replace(tuning.rows[0].config, patch=False)
    tuning = replace(tuning, rows=(replace(tuning.rows[0], config=plain),))
    options = {"clusters": built, "embedder": letters, "core": "auto", "tuning": tuning}
    with load(tiny, core="off") as llm:
        dense = llm("the night again", max_tokens=4, temperature=0)["choices"]
    with load(tiny, **options) as llm:
        assert llm("the night again", max_tokens=4, temperature=0)["choices"] == dense
        assert llm.decision.config.mode == "exact" and llm.stability is not None
        llm("the night again", max_tokens=20, temperature=0)
        assert llm.decision.config == plain and llm.core_set.cluster is not None


def test_a_prompt_of_ids_that_begins_dense_is_looked_up_without_its_answer(tiny, built):
    asked = []

    def remembering(texts):
        asked.extend(texts)
        return letters(texts)

    core = CoreConfig(mode="similar", start=4)
    with load(tiny, core=core, clusters=built, embedder=remembering) as llm:
        ids = llm.prompt_ids("the night again")
        asked.clear()  # it was on trial
        for _, _ in zip(range(6), llm.generate(ids, temp=0), strict=False):
            pass
        assert llm.core_set is not None and asked == [llm._text(ids)]


def test_auto_looks_a_prompt_s_cluster_up_once(tiny, built):
    asked = []

    def remembering(texts):
        asked.extend(texts)
        return letters(texts)

    tuning = tuned(tiny, built, -1.0, n_prompt=24)
    options = {"clusters": built, "embedder": remembering, "core": "auto", "tuning": tuning}
    with load(tiny, **options, refresh=4) as llm:
        asked.clear()  # it was tried
        llm("the night again", max_tokens=20, temperature=0)
        assert llm.core_set.cluster is not None and llm.timings.replay_tokens > 0
        assert asked == ["the night again"]


@pytest.mark.parametrize("kind", ["built", "by_neurons"])
def test_auto_says_where_a_prompt_was_read_twice(tiny, kind, request):
    clusters = request.getfixturevalue(kind)
    tuning = tuned(tiny, clusters, -1.0)
    near = tuning.rows[0]

    def by_own(**changes) -> Tuning:  # for longer prompts, by the prompt's own neurons
        config = CoreConfig(beta=0.9, prior=False, **changes)
        own = replace(near, config=config, n_prompt=128, clusters="", cluster_similarity=None)
        return replace(tuning, rows=(own, near))

    options = embedded(clusters, core="auto")
    twice = "; the prompt was read twice, to rank neurons as the clusters do"
    for table, again in ((tuning, ""), (by_own(), ""), (by_own(statistic="count"), twice)):
        with load(tiny, **options, tuning=table) as llm:
            llm("the night again and again", max_tokens=2)
            assert llm.decision.config == near.config
            assert llm.decision.reason.endswith("measured within KL 0.05" + again)
            assert (llm.timings.replay_tokens > 0) == bool(again)


def test_auto_loads_the_embedder_before_the_first_prompt_if_it_may_be_needed(
    tiny, built, monkeypatch
):
    made = []

    def embedder(given):
        made.append(given)
        return Embedder("letters", letters)

    monkeypatch.setattr("coreinfer.cluster_lookup.as_embedder", embedder)
    tuning = tuned(tiny, built, -1.0)
    with load(tiny, clusters=built, core="auto", tuning=tuning) as llm:
        assert made == ["letters"]
        llm("the night again and again", max_tokens=2)
        assert made == ["letters"]
        llm.set_clusters(built)
        assert made == ["letters"] * 2
    others = replace(tuning, rows=(replace(tuning.rows[0], clusters="others"),))
    for unused in (others, None):
        with load(tiny, clusters=built, core="auto", tuning=unused) as llm:
            llm("the night again and again", max_tokens=2)
    assert len(made) == 2
    monkeypatch.setattr("coreinfer.cluster_lookup.as_embedder", as_embedder)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"letters needs .*\[similarity\]"):
        load(tiny, clusters=built, core="auto", tuning=tuning)


def short(texts) -> np.ndarray:
    """An embedder of another dimension than `letters`."""
    return letters(texts)[:, :5]


def test_an_embedder_of_another_dimension_is_found_before_any_prompt(tiny, built):
    wrong = (
        "the embedder short makes vectors of 5 numbers, and these clusters are of 27; expected the "
        "embedder that they were built with, letters, or clusters that were built with this one"
    )
    chosen = {"core": "auto", "tuning": tuned(tiny, built, -1.0)}
    for options in ({"core": "similar"}, chosen):
        with pytest.raises(ValueError, match=wrong) as error:
            load(tiny, clusters=built, embedder=short, **options)
        # Who keeps the exception does not keep the weights with it.
        frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.tb)]
        left = next(found for found in frames if isinstance(found, Llama))
        with pytest.raises(RuntimeError, match="this Llama is closed"):
            left.n_layer()
        with load(tiny, clusters=built, embedder=letters, **options) as llm:
            with pytest.raises(ValueError, match=wrong):
                llm.set_clusters(built, short)
            assert llm("the night again and again", max_tokens=2) and llm.clusters is built
            assert llm.core_set.cluster is not None
    # Where no cluster is looked up, there is no need of one, until there is.
    with load(tiny, clusters=built, embedder=short, core="stable") as llm:
        for _ in range(2):  # the second time it is tried again
            with pytest.raises(ValueError, match=wrong):
                llm.core = "similar"
        assert llm.core.mode == "stable"
        llm("the night", max_tokens=2)


@pytest.mark.parametrize(
    ("made", "message"),
    [(np.full((1, 27), np.nan), "made a NaN"), (np.ones(27), r"shape \(27,\) of 1 texts")],
)
def test_an_embedder_that_makes_no_vectors_is_found_before_any_prompt(tiny, built, made, message):
    with pytest.raises(ValueError, match=message):
        load(tiny, core="similar", clusters=built, embedder=lambda texts: made)


def test_the_text_decides_however_the_prompt_is_given(tiny, built):
    asked = []

    def remembering(texts):
        asked.extend(texts)
        return letters(texts)

    with load(tiny, core="similar", clusters=built, embedder=remembering) as llm:
        asked.clear()  # it was tried
        text = "the river rose"
        ids = llm.prompt_ids(text)
        llm(text, max_tokens=2)
        llm(ids.tolist(), max_tokens=2)
        next(llm.generate(text.encode()))
        next(llm.generate(ids))
        llm.score(ids, ids[:2])
        llm.score(ids, ids[:2], text="another")
        messages = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
        llm.create_chat_completion([*messages, {"role": "user", "content": "4"}], max_tokens=2)
        llm.reset()
        llm.eval(ids)
        next(llm.generate(" again", reset=False))
        assert asked == [*[text] * 5, "another", "4", text + " again"]


def test_clusters_of_core_neurons_need_no_embedder(tiny, by_neurons, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    core = CoreConfig(mode="similar", gamma=0.5, blend=0)
    with load(tiny, core=core, clusters=by_neurons) as llm:
        llm(RIVER[0], max_tokens=2)
        first = llm.core_set
        assert first.same_neurons(expected_set(by_neurons, first.cluster, 0.5))
        assert llm.timings.embed_seconds == 0 and first.stability is not None
        own = core_neurons(llm.neuron_scores(llm.prompt_ids(RIVER[0])), 0.2)
        assert (first.cluster, first.cluster_similarity) == by_neurons.nearest(own)
        llm(NUMBERS[0], max_tokens=2)
        assert llm.core_set.cluster != first.cluster


def test_blending_goes_from_the_clusters_neurons_to_the_prompts_own(tiny, built):
    prompt = RIVER[0]
    with load(tiny, clusters=built, embedder=letters) as llm:

        def chosen(core: CoreConfig) -> CoreSet:
            llm.core = core
            llm(prompt, max_tokens=2)
            return llm.core_set

        own = chosen(CoreConfig(beta=0.25))
        cluster = chosen(CoreConfig(mode="similar", gamma=0.25, blend=0))
        sets = [chosen(CoreConfig(mode="similar", gamma=0.25, blend=b)) for b in (0.01, 0.5, 1)]
        assert chosen(CoreConfig(mode="similar", gamma=0.25)).same_neurons(sets[1])
        assert sets[2].same_neurons(own) and sets[2].stability == own.stability
        to_own = [own.similarity(core) for core in (cluster, *sets)]
        assert to_own == sorted(to_own) and to_own[0] < to_own[2] < 1
        assert all(core.cluster == cluster.cluster for core in sets)


@pytest.mark.parametrize("blend", [0.0, 0.6])
@pytest.mark.parametrize("kind", ["built", "by_neurons"])
def test_refresh_blends_what_was_generated_into_the_cluster(tiny, kind, blend, request):
    clusters = request.getfixturevalue(kind)
    core = CoreConfig(mode="similar", gamma=0.25, blend=blend, refresh=8, patch=8)
    with load(tiny, core=core, **embedded(clusters)) as llm:
        prompt = llm.prompt_ids("the night again")
        found = {}
        for _ in llm.generate(prompt, temp=0):
            found[llm.n_tokens] = llm.core_set, llm._open_session().n_dense
            if len(found) == 20:
                break
        ids = llm.input_ids
        sizes = list(found)
        refreshed = {
            n for n, m in zip(sizes[1:], sizes, strict=False) if found[n][0] is not found[m][0]
        }
        assert refreshed == {prompt.size + 8, prompt.size + 16}
        first, _ = found[prompt.size]
        for n in (prompt.size, *sorted(refreshed)):
            chosen, n_dense = found[n]
            assert n_dense == n  # what was decoded with core neurons is dense again
            assert (chosen.cluster, chosen.cluster_similarity) == (
                first.cluster,
                first.cluster_similarity,
            )
            own = llm.neuron_scores(ids[:n])
            weight = max(blend, (n - prompt.size) / n)
            of_cluster = np.stack([layer[chosen.cluster] for layer in clusters.scores])
            expected = weight * own + (1 - weight) * of_cluster
            np.testing.assert_allclose(np.stack(chosen.scores), expected, rtol=1e-3, atol=1e-6)
            assert chosen.patch_rank == 8
        assert not found[prompt.size + 16][0].same_neurons(first)


def test_an_answer_may_begin_dense_with_clusters_too(tiny, built):
    core = CoreConfig(mode="similar", gamma=0.25, blend=0.5, start=6, patch=False)
    with load(tiny, core=core, clusters=built, embedder=letters) as llm:
        prompt = llm.prompt_ids("the night again")
        chosen = []
        for _ in itertools.islice(llm.generate(prompt, temp=0), 9):
            chosen.append(llm.core_set)
        assert chosen[:6] == [None] * 6 and chosen[6].cluster is not None
        assert {core_set.n_tokens for core_set in chosen[6:]} == {prompt.size + 6}


def test_a_refresh_of_a_cluster_s_neurons_is_fresh_for_the_next_text(tiny, built):
    options = {"clusters": built, "embedder": letters, "core": "similar", "gamma": 0.25}
    with load(tiny, **options, refresh=4) as llm:
        llm(TEXTS[0], max_tokens=12, temperature=0)
        assert llm.timings.replay_tokens > 0
        llm(NUMBERS[0], max_tokens=2, temperature=0)
        again = llm.core_set
        assert llm.timings.replay_tokens == 0
    with load(tiny, **options) as llm:
        llm(NUMBERS[0], max_tokens=2, temperature=0)
        assert again.cluster == llm.core_set.cluster and again.same_neurons(llm.core_set)


def test_auto_refreshes_a_cluster_s_neurons(tiny, built):
    tuning = tuned(tiny, built, -1.0)
    options = {"clusters": built, "embedder": letters, "core": "auto", "tuning": tuning}
    with load(tiny, **options, refresh=4) as llm:
        llm("the night again and again", max_tokens=12, temperature=0)
        assert llm.core_set.cluster is not None and llm.timings.replay_tokens > 0


def test_chat_prompts_are_read_through_the_template(tiny):
    with load(tiny) as llm:
        clusters = build_clusters(
            llm, RIVER, embedder=letters, n_clusters=1, chat=True, random_state=0
        )
        ids = [llm.chat_prompt_ids([{"role": "user", "content": text}]) for text in RIVER]
        expected = np.mean([llm.neuron_scores(i)[2] for i in ids], axis=0)
    assert clusters.chat
    np.testing.assert_allclose(clusters.scores[2][0], expected, rtol=1e-4, atol=1e-7)


def test_what_does_not_fit_is_refused_and_the_model_goes_on(tiny, built, tmp_path, monkeypatch):
    other = tmp_path / "other.gguf"
    make_tiny_model(other, "llama", "F32", seed=1)
    with load(str(other)) as llm:
        with pytest.raises(ValueError, match="clusters belong to another model"):
            llm.set_clusters(built)
        with pytest.raises(ValueError, match="for a model of 2 layers with 64 neurons; this one"):
            llm.set_clusters(make_clusters())
        narrow = make_prior(llm.n_layer(), llm.n_ff())
        with pytest.raises(ValueError, match="prior is for embeddings of 8 numbers; this model's"):
            llm.set_clusters(replace(built.for_any_model(), prior=narrow))
        with pytest.raises(ValueError, match="not a valid file of clusters"):
            llm.set_clusters(other)
        with pytest.raises(FileNotFoundError):
            llm.set_clusters(tmp_path / "none.npz")
        with pytest.raises(ValueError, match="core is 'similar'.*there are none"):
            llm.core = "similar"
        assert llm.clusters is None
        llm.set_clusters(built.for_any_model(), letters)
        llm.core = "similar"
        with pytest.raises(ValueError, match="there are none"):
            llm.set_clusters(None)
        sizes = [27, 4]  # on trial, then with the prompt
        llm.set_clusters(built.for_any_model(), lambda texts: np.ones((len(texts), sizes.pop(0))))
        with pytest.raises(ValueError, match=r"shape \(4,\); these clusters have 27"):
            llm("the river", max_tokens=2)
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(ImportError, match=r"letters needs .*\[similarity\]"):
            llm.set_clusters(built.for_any_model())
        llm.set_clusters(built.for_any_model(), letters)
        assert len(llm("the river", max_tokens=2)["choices"][0]["text"]) > 0
        assert llm.core_set.fingerprint == llm.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": "similar"}, "there are none; give clusters a file"),
        ({"gamma": 0.2}, "gamma is 0.2; it needs core='similar', but core is '"),
        ({"core": "similar", "gamma": 0}, r"gamma is 0; expected a number in \(0, 1\]"),
        ({"embedder": letters}, "no clusters to use it with"),
        (
            {"clusters": make_clusters_by_neurons(), "embedder": letters},
            "embedder is <function letters .*>, but these clusters are by neurons, which look no",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        load(tiny, **options)


def test_blend_is_a_share():
    with pytest.raises(ValueError, match=r"blend is 1.5; expected a number in \[0, 1\]"):
        CoreConfig(mode="similar", blend=1.5)


def test_a_pickled_model_keeps_its_clusters(tiny, built):
    with load(tiny, core="similar", clusters=built, embedder=letters) as llm:
        again = pickle.loads(pickle.dumps(llm))
    with again:
        again("the night", max_tokens=2)
        assert again.core_set.cluster == built.nearest(letters(["the night"])[0])[0]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "0 texts to cluster"),
        (["one"], {}, "1 texts to cluster; expected at least 2"),
        (["word " * 500, "b"], {"by": "colour"}, "by is 'colour'"),  # before any text is read
        ("one text", {}, "texts is 'one text'; expected a sequence of texts"),
        (["word " * 500, "b"], {"patch_rows": 1.5}, "patch_rows is 1.5; expected an integer"),
        (["b", 5], {}, r"text 2 \(5\): prompt is 5 \(int\); expected text"),
        (TEXTS, {"statistic": "best"}, "statistic is 'best'"),
        (["word " * 500, "b"], {"by": "neurons", "beta": 1e-4}, "beta is 0.0001, which is less"),
        (["b", "word " * 500], {}, r"text 2 \('word word .*'\): .* exceed context window of 256"),
        (["word " * 500, "b"], {"n_clusters": 2}, "n_clusters is 2; expected at most 1"),
        (["word " * 500, "b"], {"random_state": -1}, "random_state is -1"),
        ([*TEXTS, "a" * 20], {"n_clusters": 3}, "has 1; expected at least 2"),
    ],
)
def test_a_build_that_cannot_be_is_refused(tiny, texts, options, message):
    pytest.importorskip("sklearn")
    with load(tiny) as llm, pytest.raises(ValueError, match=message):
        build_clusters(llm, texts, **{"embedder": letters, **options})


def test_a_text_that_does_not_fit_is_found_before_any_is_read(tiny, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(Llama, "neuron_scores", lambda *_, **__: pytest.fail("a text was read"))
    with load(tiny) as llm, pytest.raises(ValueError, match="text 9 "):
        build_clusters(llm, [*TEXTS, "word " * 500], embedder=letters)


def test_a_build_without_room_for_its_scores_says_where_and_the_model_goes_on(tiny, monkeypatch):
    pytest.importorskip("sklearn")
    room = r"0\.0 MB of neuron scores.*No space left on device.*TMPDIR"
    with load(tiny) as llm:
        with monkeypatch.context() as full:
            full.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "wb"))
            with pytest.raises(OSError, match=room.replace("0\\.0", "0\\.[0-9]")):
                build_clusters(llm, TEXTS, by="neurons")
        small = shutil.disk_usage("/")._replace(free=1)
        monkeypatch.setattr("shutil.disk_usage", lambda _: small)
        with monkeypatch.context() as idle:
            idle.setattr(Llama, "neuron_scores", lambda *_, **__: pytest.fail("a text was read"))
            with pytest.raises(OSError, match="No space left on device") as error:
                build_clusters(llm, TEXTS, by="neurons")
        assert error.value.filename == tempfile.gettempdir()
        assert llm("the night", max_tokens=2)["choices"]


def test_a_patch_learns_from_the_texts_of_the_clusters_file(tiny, built):
    assert built.prior.n_rows == 128 and built.prior.n_embd == 256
    prompt = TEXTS[0]

    def factors(llm: Llama) -> np.ndarray:  # (k, n_embd), what the patch adds a kept activation
        llm.score(llm.prompt_ids(prompt), [1])
        inner, outer = (a.astype(np.float64) for a in llm.core_set.patch[0])
        return (outer @ inner).T

    with load(tiny, core=CoreConfig(beta=0.2), clusters=built) as llm:
        learned = factors(llm)
        llm.core = CoreConfig(beta=0.2, prior=False)
        own = factors(llm)
        llm.core = CoreConfig(beta=0.2)
        rounding = 0.01 * np.abs(own).max()
        assert np.abs(factors(llm) - learned).max() < rounding
        llm.set_clusters(replace(built, prior=None))
        assert np.abs(factors(llm) - own).max() < rounding
        assert np.abs(learned - own).max() > 10 * rounding
        other = replace(built.prior, h=built.prior.h[:2], y=built.prior.y[:2],
                        weights=built.prior.weights[:2])  # fmt: skip
        with pytest.raises(ValueError, match="prior is of 2 layers, n_ff 512 and n_embd 256"):
            llm._open_session().fit_patch(_core.PatchPrior(other.h, other.y, other.weights))


def test_no_prior_is_built_where_none_is_wanted(tiny):
    with load(tiny) as llm:
        with pytest.raises(ValueError, match="patch_rows is -1; expected an integer"):
            build_clusters(llm, TEXTS, embedder=letters, patch_rows=-1)
        clusters = build_clusters(
            llm, TEXTS, embedder=letters, n_clusters=1, patch_rows=0, random_state=0
        )
    assert clusters.prior is None


# --- the measurement ---


def test_measured_prompts_have_the_length_asked_for(tiny):
    with load(tiny) as llm:
        cut = cut_prompts(llm, ["a", *TEXTS], 10, 3)
        assert [ids.size for ids in cut] == [10, 10, 10]
        assert cut[0].tolist() == llm.prompt_ids(TEXTS[0])[-10:].tolist()
        whole = cut_prompts(llm, TEXTS, 0, 20)
        assert [ids.tolist() for ids in whole] == [llm.prompt_ids(text).tolist() for text in TEXTS]


def test_measured_divergence_is_none_with_all_neurons_and_some_with_few(tiny, built):
    with load(tiny, clusters=built, embedder=letters) as llm:
        prompts = cut_prompts(llm, TEXTS, 12, 3)
        cores = {
            "all": CoreConfig(mode="similar", gamma=1),
            "few": CoreConfig(mode="similar", gamma=0.1),
            "own": CoreConfig(beta=0.1),
            "blended": CoreConfig(mode="similar", gamma=0.1, blend=1),
        }
        rows = compare(llm, prompts, cores, 8)
    assert np.abs(rows["all"] - [0, 1]).max() < 1e-4
    assert rows["few"].shape == (3, 2) and (rows["few"][:, 0] > 0.01).all()
    assert np.array_equal(rows["own"], rows["blended"])
    assert not np.array_equal(rows["own"], rows["few"])


def test_clusters_of_two_kinds_are_measured_beside_the_prompts_own_neurons(
    tiny, built, by_neurons, tmp_path, capsys, monkeypatch
):
    data, files = tmp_path / "texts.jsonl", [tmp_path / "a.npz", tmp_path / "b.npz"]
    write_texts(data, "text")
    built.save(files[0])
    by_neurons.save(files[1])
    monkeypatch.setattr("coreinfer.cluster_lookup.as_embedder", lambda _: Embedder("", letters))
    more = f"{tiny} {files[0]} {files[1]} --data {data} --fields text --lengths 8 12"
    more += " --prompts 4 --tokens 8 --blends 0 1 --share 0.1"
    monkeypatch.setattr(sys, "argv", ["measure_similarity", *more.split()])
    measure_similarity.main()
    out = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out]
    assert out[1:3] == ["2 clusters by embedding, flock", "2 clusters by neurons, flock"]
    ways = ["stable", "similar by embedding", "similar by embedding, blend 1"]
    assert table[4] == [
        "prompt tokens",
        *ways,
        *(w.replace("embedding", "neurons") for w in ways[1:]),
    ]
    kl, less = ([float(c.split()[0]) if c else None for c in table[i][1:]] for i in (6, 7))
    assert kl[0] > 0.01 and kl[2] == kl[0] != kl[1]  # blend 1 is the prompt's own
    assert less[0] is None and less[2] == 0
    assert less[1] == pytest.approx(kl[1] - kl[0], abs=2e-3)
    assert [row[:2] for row in table[-4:]] == [
        ["8", "embedding"], ["8", "neurons"], ["12", "embedding"], ["12", "neurons"]
    ]  # fmt: skip
    assert table[-3][-1] == "0.0 ms"


def test_a_measured_refresh_of_a_clusters_neurons_is_what_a_generation_does(tiny, by_neurons):
    core = CoreConfig(mode="similar", gamma=0.2, blend=0.3, refresh=8, patch=False)
    with load(tiny, core=core, clusters=by_neurons) as llm:
        prompt = llm.prompt_ids(TEXTS[0] + TEXTS[1])
        taken = np.array(list(itertools.islice(llm.generate(prompt, temp=0), 25)), np.int32)
        chosen = llm.core_set
        llm.core = replace(core, refresh=None)
        llm.set_clusters(measure_refresh.cluster_of(llm, prompt, by_neurons))
        assert llm.clusters.n_clusters == 1
        refreshed = measure_refresh.forced(llm, prompt, taken, 8)
        assert refreshed.argmax(axis=1).tolist() == taken.tolist()
        scores = np.stack(llm.core_set.scores)
        np.testing.assert_allclose(scores, np.stack(chosen.scores), rtol=1e-3, atol=1e-6)
        assert llm.core.blend == 0.3

        llm.set_clusters(by_neurons)
        kl = measure_refresh.compare(
            llm, [np.concatenate([prompt, taken])], prompt.size, llm.core, [None, 8]
        )
        assert llm.clusters is by_neurons
        assert kl[8].shape == (1, 25) and not np.array_equal(kl[8], kl[None])


def test_the_patch_is_measured_with_and_without_a_prior(tiny, built, tmp_path, capsys, monkeypatch):
    data, clusters = tmp_path / "texts.jsonl", tmp_path / "c.npz"
    write_texts(data, "text")
    built.save(clusters)
    more = f"--length 12 --prompts 3 --tokens 8 --betas 0.1 0.3 --clusters {clusters}"
    monkeypatch.setattr(sys, "argv", ["measure_patch", tiny, "--data", str(data), *more.split()])
    measure_patch.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny.gguf, 3 prompts of 12 tokens"
    assert lines[2] == "| KL, agreement | no patch | patch | patch, prior |"
    kl = [[float(cell.split()[0]) for cell in line.split("|")[2:-1]] for line in lines[4:6]]
    assert len({*kl[0], *kl[1]}) == 6 and min(kl[0]) > 0.01
    assert (
        f"β = 0.1 with patch, prior, over β = 0.3 with none: {kl[0][2] / kl[1][0]:.1f}" in lines[-1]
    )
    replace(built, prior=None).save(clusters)
    with pytest.raises(SystemExit, match="holds no prior; build it with --patch-rows 128"):
        measure_patch.main()
