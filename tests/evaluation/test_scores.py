import math
from types import SimpleNamespace

import numpy as np
import torch

from evaluation.features import embed, raw_pixels
from evaluation.knn import knn_top1
from evaluation.linear import linear_top1
from evaluation.report import Evaluator, report_table


def clusters(n, seed, spread):
    random = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 4
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(9))
    return centres[label] + spread * torch.randn(n, 16, generator=random), label


def knn_in_loops(bank, bank_label, query, query_label, k, temperature):
    right = 0
    for q, truth in zip(query.tolist(), query_label.tolist(), strict=True):

        def cosine(b, q=q):
            return sum(x * y for x, y in zip(b, q, strict=True)) / (math.hypot(*b) * math.hypot(*q))

        nearest = sorted(
            ((cosine(b), c) for b, c in zip(bank.tolist(), bank_label.tolist(), strict=True)), reverse=True
        )
        votes = {}
        for similarity, label in nearest[:k]:
            votes[label] = votes.get(label, 0) + math.exp(similarity / temperature)
        right += max(votes, key=votes.get) == truth
    return right / len(query)


def test_knn_is_its_definition():
    bank, query = clusters(60, 0, 1.2), clusters(50, 1, 1.2)
    for k in (1, 7, 60):
        expected = knn_in_loops(*bank, *query, k, 0.1)
        assert knn_top1(*bank, *query, k=k) == expected
        assert 0.3 < expected < 1
    assert knn_top1(*bank, *query, k=200) == knn_top1(*bank, *query, k=60)


def test_knn_ignores_length():
    bank, query = clusters(60, 0, 0.5), clusters(50, 1, 0.5)
    longer = (bank[0] * torch.arange(1, 61)[:, None], bank[1])
    assert knn_top1(*longer, *query, k=5) == knn_top1(*bank, *query, k=5)


def test_linear_separates_what_is_separable_and_guesses_noise():
    train, test = clusters(512, 0, 0.3), clusters(200, 1, 0.3)
    assert linear_top1(*train, *test) > 0.97
    noise = torch.randn(512, 16, generator=torch.Generator().manual_seed(3))
    assert linear_top1(noise, train[1], torch.randn(400, 16), torch.arange(400) % 4) < 0.4
    assert linear_top1(*train, *test, seed=1) == linear_top1(*train, *test, seed=1)


def test_raw_pixels_are_averaged_down_to_32():
    assert raw_pixels(torch.randn(2, 3, 24, 24)).shape == (2, 3 * 24 * 24)
    views = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(raw_pixels(views).view(2, 3, 32, 32)[0, 1, 3, 5], views[0, 1, 6:8, 10:12].mean())


def test_embedding_leaves_no_graph_and_keeps_order():
    batches = [SimpleNamespace(views=torch.full((2, 3, 4, 4), float(i)), label=torch.tensor([i, -1])) for i in range(3)]
    weight = torch.ones(48, 2, requires_grad=True)
    features, label = embed(lambda views: views.flatten(1) @ weight, batches)
    assert features[:, 0].tolist() == [0, 0, 48, 48, 96, 96] and label.tolist() == [0, -1, 1, -1, 2, -1]
    assert not features.requires_grad


def test_ranks_share_the_embedding_and_put_it_in_order():
    """Two ranks, played one after the other: what each embeds, and what both make of it together."""
    splits = {"train": clusters(41, 0, 0.8), "test": clusters(23, 1, 0.8)}

    def central_batches(split, samples):
        features, label = splits[split]
        yield SimpleNamespace(views=features[samples], label=label[samples])

    def evaluator(rank, world_size, gather):
        train, test = (("train", np.arange(41)), ("test", np.arange(23)))
        return Evaluator(train, test, central_batches, gather, rank, world_size, k=5, max_bank=40)

    def identity(x):
        return x

    alone = evaluator(0, 1, identity)(identity)
    sent = {0: [], 1: []}
    for rank in (0, 1):
        evaluator(rank, 2, lambda part, rank=rank: sent[rank].append(part) or torch.cat([part, part]))(identity, False)
    replies = [torch.cat(pair) for pair in zip(*sent.values(), strict=True)]
    assert sum(len(part) for part in sent[0]) < 2 * (40 + 23) * 0.6, "each rank embeds its half"
    assert evaluator(0, 2, lambda part: replies.pop(0))(identity) == alone
    assert alone["knn_top1"] == knn_top1(
        splits["train"][0][np.linspace(0, 40, 40).astype(int)],
        splits["train"][1][np.linspace(0, 40, 40).astype(int)],
        *splits["test"],
        k=5,
    )


def test_the_table_has_a_row_per_kind_of_features():
    table = report_table({"untrained": {"knn_top1": 0.25, "linear_top1": 0.3}})
    assert table.row_count == 1 and table.columns[0].header == "features"
