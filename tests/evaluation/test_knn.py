import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from evaluation import knn
from evaluation.knn import class_votes, knn_correct, knn_top1, nearest
from tests.evaluation.clusters import clusters

CPU = torch.device("cpu")


def knn_in_loops(bank, bank_label, query, query_label, k, temperature):
    correct = 0
    for q, truth in zip(query.tolist(), query_label.tolist(), strict=True):

        def cosine(b, q=q):
            return sum(x * y for x, y in zip(b, q, strict=True)) / (math.hypot(*b) * math.hypot(*q))

        neighbors = sorted(
            ((cosine(b), c) for b, c in zip(bank.tolist(), bank_label.tolist(), strict=True)), reverse=True
        )
        votes = {}
        for similarity, label in neighbors[:k]:
            votes[label] = votes.get(label, 0) + math.exp(similarity / temperature)
        correct += max(votes, key=votes.get) == truth
    return correct / len(query)


def test_knn_matches_its_definition():
    bank, query = clusters(60, 0, 1.2), clusters(50, 1, 1.2)
    for k in (1, 7, 60):
        expected = knn_in_loops(*bank, *query, k, 0.1)
        assert knn_top1(*bank, *query, k=k) == expected
        assert 0.3 < expected < 1
    assert knn_top1(*bank, *query, k=200) == knn_top1(*bank, *query, k=60)


def test_knn_ignores_the_length_of_features():
    bank, query = clusters(60, 0, 0.5), clusters(50, 1, 0.5)
    longer = (bank[0] * torch.arange(1, 61)[:, None], bank[1])
    assert knn_top1(*longer, *query, k=5) == knn_top1(*bank, *query, k=5)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.07), (20, 0.1), (150, 1.0)])
def test_predictions_match_scikit_learn(k, temperature, monkeypatch):
    """On every query whose two best classes differ by more than float32 rounding errors."""
    monkeypatch.setattr(knn, "QUERY_ROWS", 37)
    monkeypatch.setattr(knn, "BANK_ROWS", 41)
    (bank, label), (query, _) = clusters(300, 0, 1.5, classes=7), clusters(200, 1, 1.5, classes=7)
    peer = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    peer.fit(bank.double().numpy(), label.numpy())
    probability = torch.from_numpy(peer.predict_proba(query.double().numpy()))
    top2 = probability.topk(2, dim=1).values
    # error of a cosine: at most (D + 2) eps; of its weight: that over the temperature; a vote is a sum of k weights
    error = 2 * (16 + 2) * torch.finfo(torch.float32).eps / temperature + k * torch.finfo(torch.float32).eps
    clear = top2[:, 0] - top2[:, 1] > 2 * error
    assert clear.sum() >= 199, "nearly all queries are compared"
    predicted = torch.cat(
        [
            class_votes(cosine, label[place], 7, temperature).argmax(1)
            for _, (cosine, place) in nearest(bank, query, k, CPU)
        ]
    )
    assert torch.equal(predicted[clear], probability.argmax(1)[clear])
    assert 0.3 < (predicted == torch.arange(200) % 7).float().mean() < 0.99


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(1, 90), st.integers(1, 30), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.data())
def test_running_top_k_matches_that_of_the_whole_matrix(bank_size, queries, bank_rows, query_rows, seed, data):
    """With small integers, which produce many equal cosines, among which the first must be chosen."""
    k = data.draw(st.integers(1, bank_size))
    random = torch.Generator().manual_seed(seed)
    bank = torch.randint(-1, 2, (bank_size, 3), generator=random).float()
    query = torch.randint(-1, 2, (queries, 3), generator=random).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "QUERY_ROWS", query_rows)
        patch.setattr(knn, "BANK_ROWS", bank_rows)
        found = list(nearest(bank, query, k, CPU))
        cosine, place = (torch.cat(each) for each in zip(*(pair for _, pair in found), strict=True))
        patch.setattr(knn, "QUERY_ROWS", 1000)
        patch.setattr(knn, "BANK_ROWS", 1000)
        ((_, (sorted_cosine, sorted_place)),) = nearest(bank, query, bank_size, CPU)
    torch.testing.assert_close(cosine, sorted_cosine[:, :k], rtol=0, atol=1e-6)
    assert (cosine[:, 1:] <= cosine[:, :-1]).all()
    assert all(len(set(row)) == k for row in place.tolist())
    own = (torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(bank).T).gather(1, place)
    torch.testing.assert_close(cosine, own, rtol=0, atol=1e-6)
    equal = sorted_cosine[:, 1:] == sorted_cosine[:, :-1]
    assert (sorted_place[:, 1:] > sorted_place[:, :-1])[equal].all()


def test_first_of_equal_neighbors_votes():
    bank = torch.tensor([[1.0, 0.0]]).repeat(50, 1)
    ((_, (cosine, place)),) = nearest(bank, torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), 3, CPU)
    assert place.tolist() == [[0, 1, 2]] * 3 and cosine.tolist() == [[1.0] * 3, [-1.0] * 3, [0.0] * 3]


def test_top_5_and_classes_without_a_vote():
    bank, query = clusters(80, 0, 2.0, classes=8), clusters(80, 1, 2.0, classes=8)
    correct = knn_correct(*bank, *query, k=[1, 40], temperature=[0.1, 0.5], classes=8, device=CPU)
    assert list(correct) == [(1, 0.1), (1, 0.5), (40, 0.1), (40, 0.5)]
    assert correct[1, 0.1][0] == correct[1, 0.1][1] == correct[1, 0.5][1], "a single vote names a single class"
    assert correct[40, 0.5][0] < correct[40, 0.5][1] < 80
    # top-5 by its definition, where all neighbors vote
    ((_, (cosine, place)),) = nearest(bank[0], query[0], 80, CPU)
    votes = class_votes(cosine, bank[1][place], 8, 0.5)
    expected = sum(int(truth) in row for truth, row in zip(query[1], votes.topk(5).indices.tolist(), strict=True))
    assert knn_correct(*bank, *query, k=[80], temperature=[0.5], classes=8, device=CPU)[80, 0.5][1] == expected


def test_small_temperature_does_not_overflow():
    bank, query = clusters(60, 0, 0.5), clusters(50, 1, 0.5)
    assert knn_top1(*bank, *query, k=5, temperature=0.001) == knn_top1(*bank, *query, k=1)


def test_nan_votes_are_never_correct():
    nan = float("nan")
    bank = clusters(20, 0, 1.0)
    correct = knn_correct(*bank, *bank, k=[3], temperature=[nan], classes=4, device=CPU)
    assert correct[3, nan] == (0, 0)


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e20, 1e37])
def test_scale_of_features_does_not_matter(scale):
    """Powers of ten round once, unlike powers of two, and denormal numbers keep few digits."""
    bank, query = clusters(60, 0, 0.3), clusters(50, 1, 0.3)
    scaled = [(features * scale, label) for features, label in (bank, query)]
    ((_, (cosine, _)),) = nearest(scaled[0][0], scaled[1][0], 60, CPU)
    unit = [each[0].double() / each[0].double().norm(dim=1, keepdim=True) for each in scaled]
    truth = (unit[1] @ unit[0].T).sort(dim=1, descending=True).values
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(cosine.double(), truth, rtol=0, atol=(16 + 4) * eps)  # lengths and sums of 16 terms
    assert knn_top1(*scaled[0], *scaled[1], k=5) == knn_top1(*bank, *query, k=5) > 0.9
