"""Retrieval and wrong sounds: the reference numbers, sorted lists, collapsed embeddings."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

import scoring.retrieval as retrieval

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)


def test_retrieval_matches_the_reference():
    golden = np.load(GOLDEN / "evaluation_public.npz")
    image, audio = torch.from_numpy(golden["fn_image_slots"]), torch.from_numpy(golden["fn_audio_slots"])
    recall = retrieval.retrieval_recall(image, audio)
    assert np.allclose(list(recall["image_to_audio"].values()), golden["retrieval_i2a"], rtol=0, atol=1e-6)
    assert np.allclose(list(recall["audio_to_image"].values()), golden["retrieval_a2i"], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- retrieval


def test_collapsed_embeddings_find_nothing():
    collapsed = torch.randn(1, 8).expand(40, 8) * torch.linspace(1, 3, 40)[:, None]  # one direction, any length
    for image, audio in ((collapsed, collapsed), (collapsed * (1 + 1e-7), -collapsed)):
        for recalls in retrieval.retrieval_recall(image, audio).values():
            assert recalls == {"R@1": 0, "R@5": 0, "R@10": 0}
        assert retrieval.retrieval_score(image, audio) == 0
    by_class = retrieval.retrieval_recall(collapsed, collapsed, ["a", "b"] * 20)
    assert by_class["image_to_audio"]["R@10"] == 0
    assert retrieval.retrieval_score(torch.zeros(5, 3), torch.zeros(5, 3)) == 0


@few
@given(SEEDS)
def test_retrieval_is_the_sorted_list(seed):
    generator = torch.Generator().manual_seed(seed)
    image, audio = torch.randn(2, 30, 6, generator=generator)
    labels = torch.randint(0, 4, (30,), generator=generator).tolist()
    similarity = torch.nn.functional.normalize(image, dim=1) @ torch.nn.functional.normalize(audio, dim=1).T
    nearest = similarity.argsort(dim=1, descending=True)
    for k, by_pair in retrieval.retrieval_recall(image, audio, ks=(1, 5, 10))["image_to_audio"].items():
        count = int(k[2:])
        assert by_pair == pytest.approx(np.mean([i in nearest[i, :count] for i in range(30)]))
        by_class = retrieval.retrieval_recall(image, audio, labels)["image_to_audio"][k]
        hits = [labels[i] in [labels[j] for j in nearest[i, :count]] for i in range(30)]
        assert by_class == pytest.approx(np.mean(hits))
    whole = retrieval.partner_ranks(image, audio, labels)
    assert torch.equal(retrieval.partner_ranks(image, audio, labels, chunk=7), whole)


@pytest.mark.parametrize("labels", [None, [i % 3 for i in range(11)]])
@pytest.mark.parametrize("chunk", [1, 12, 1024])
def test_of_several_vectors_of_a_sample_the_best_counts(chunk, labels):
    generator = torch.Generator().manual_seed(3)
    tokens, sounds = torch.randn(11, 5, 4, generator=generator), torch.randn(11, 4, generator=generator)
    unit = torch.nn.functional.normalize
    scores = [[max(float(unit(t, dim=0) @ unit(s, dim=0)) for t in picture) for s in sounds] for picture in tokens]
    right = labels or range(11)
    for image_first, rows in ((True, scores), (False, list(zip(*scores, strict=True)))):
        expected = []
        for i, row in enumerate(rows):
            best = max(value for j, value in enumerate(row) if right[j] == right[i])
            expected.append(1 + sum(value >= best for j, value in enumerate(row) if right[j] != right[i]))
        sides = (tokens, sounds) if image_first else (sounds, tokens)
        assert retrieval.partner_ranks(*sides, labels, chunk).tolist() == expected
    assert max(expected) > 2
    recall = retrieval.retrieval_recall(tokens, sounds, labels, ks=(1,))
    assert recall["audio_to_image"]["R@1"] == pytest.approx(np.mean([rank == 1 for rank in expected]))
    one, other = (retrieval.partner_ranks(x, sounds + 1, labels) for x in (sounds[:, None], sounds))
    assert torch.equal(one, other)


def test_the_retrieval_score_runs_from_chance_to_one():
    generator = torch.Generator().manual_seed(0)
    image, audio = torch.randn(2, 400, 16, generator=generator)
    assert retrieval.retrieval_score(image, 3 * image) == 1
    assert retrieval.retrieval_score(image, audio) == pytest.approx(0.5, abs=0.05)
    assert retrieval.retrieval_score(image, -image) < 0.01


def test_an_epoch_is_within_the_noise_of_another_by_the_pairs_that_changed():
    rng = np.random.default_rng(0)
    hard = torch.from_numpy(rng.uniform(0.2, 1, 200))  # what is hard for both says nothing
    change = torch.from_numpy(rng.normal(0, 0.05, 200))
    error = change.std() / 200**0.5
    for shift, within in ((-0.9, True), (-1.1, False), (3, True)):
        other = hard + change - change.mean() + shift * error
        assert retrieval.within_one_error(other, hard) is within
    assert retrieval.within_one_error(hard, hard)
    assert not retrieval.within_one_error(hard - 1e-4, hard)
    assert retrieval.within_one_error(hard[:1], hard[:1]) and not retrieval.within_one_error(hard[:1] - 0.1, hard[:1])


def test_the_scores_of_pairs_are_their_percentiles_both_ways():
    generator = torch.Generator().manual_seed(1)
    image, audio = torch.randn(2, 30, 6, generator=generator)
    ranks = retrieval.ranks_both_ways(image, audio)
    scores = ranks.scores()
    assert scores.mean().item() == pytest.approx(retrieval.retrieval_score(image, audio))
    first = (ranks.image_to_audio[0] + ranks.audio_to_image[0]).item()
    assert scores[0].item() == pytest.approx(1 - (first / 2 - 1) / 29)
    assert ranks.recall() == retrieval.retrieval_recall(image, audio)


def test_retrieval_refuses_what_would_score_by_accident():
    good, bad = torch.rand(4, 3), torch.rand(4, 3)
    bad[2, 1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        retrieval.retrieval_recall(good, bad)
    with pytest.raises(ValueError, match="targets"):
        retrieval.retrieval_recall(good, good, ["a"])
    with pytest.raises(ValueError, match="embeddings"):
        retrieval.retrieval_recall(good, good[:3])
    with pytest.raises(ValueError, match="embeddings"):
        retrieval.retrieval_recall(torch.rand(4, 5, 2), good)


# ---------------------------------------------------------------- wrong sounds


@few
@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=40), SEEDS)
def test_a_derangement_avoids_the_label_wherever_it_can(labels, seed):
    permutation, same_label = retrieval.derangement(labels, seed)
    assert sorted(permutation) == list(range(len(labels)))
    assert all(i != j for i, j in enumerate(permutation))
    clashes = sum(labels[i] == labels[j] for i, j in enumerate(permutation))
    unavoidable = max(0, 2 * max(map(labels.count, labels)) - len(labels))
    assert clashes == same_label == unavoidable
    assert (retrieval.derangement(labels, seed).permutation == permutation).all()


def test_a_derangement_depends_on_its_seed_and_needs_two_samples():
    ids = [f"id{i}" for i in range(50)]
    assert (retrieval.derangement(ids, 0).permutation != retrieval.derangement(ids, 1).permutation).any()
    with pytest.raises(ValueError, match="two"):
        retrieval.derangement(["a"], 0)


@few
@given(SEEDS, st.integers(2, 40), st.integers(1, 5))
def test_partners_hold_nothing_that_a_sample_is_known_for(seed, count, most):
    rng = np.random.default_rng(seed)
    heard = [{*rng.choice(list("abcdefgh"), rng.integers(1, most + 1)).tolist()} for _ in range(count)]
    known = [{*rng.choice(list("abcdefgh"), rng.integers(0, most)).tolist()} for _ in range(count)]
    drawn = retrieval.disjoint_partners(heard, known, seed)
    again = retrieval.disjoint_partners(heard, known, seed)
    assert sorted(drawn.permutation) == list(range(count)) and (drawn.permutation == again.permutation).all()
    assert (drawn.permutation != np.arange(count)).all()
    clashes = sum(bool(heard[j] & (known[i] | heard[i])) for i, j in enumerate(drawn.permutation))
    assert drawn.same_label == clashes


def test_partners_are_found_where_there_are_any():
    heard = [{"abcdefghij"[i % 10]} for i in range(400)]
    known = [{"abcdefghij"[(i + k) % 10] for k in range(3)} for i in range(400)]
    assert all(retrieval.disjoint_partners(heard, known, seed).same_label == 0 for seed in range(5))
    assert retrieval.disjoint_partners([{"a"}] * 3, [{"a"}] * 3, 0).same_label == 3


def test_retrieval_by_several_labels_takes_any_that_both_share():
    seen, heard = [{"dog"}, {"car"}, {"dog", "man"}], [{"dog", "man"}, {"man"}, {"cat"}]
    right = retrieval.shared_labels(seen, heard)
    assert right.tolist() == [[True, False, False], [False, True, False], [True, True, True]]
    image, audio = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])  # audio 1 is most like image 2
    recall = retrieval.retrieval_recall(image, audio, right)
    assert recall["image_to_audio"]["R@1"] == pytest.approx(2 / 3) == recall["audio_to_image"]["R@1"]
    labels = ["a", "b", "a"]
    same = np.equal.outer(labels, labels)
    assert retrieval.retrieval_recall(image, audio, labels) == retrieval.retrieval_recall(image, audio, same)
