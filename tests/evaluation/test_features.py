from types import SimpleNamespace

import numpy as np
import torch

from evaluation.features import embed, raw_pixels
from evaluation.knn import knn_top1
from evaluation.report import Evaluator, over_seeds, report_table, scores, scores_table
from tests.evaluation.clusters import clusters


def batches_of(features, label, size=10, bad=None):
    """As `center_crop_batches`: `bad` maps samples to those that take their place."""

    def center_crop_batches(samples):
        for first in range(0, len(samples), size):
            chosen = np.array([(bad or {}).get(each, each) for each in samples[first : first + size]])
            yield SimpleNamespace(views=features[chosen], label=label[chosen], index=torch.from_numpy(chosen))

    return center_crop_batches


def identity(x):
    return x


def play_two_ranks(run):
    """What run(rank, gather) returns on rank 0 of two, played one after the other, and how much rank 0 sent."""
    sent = {0: [], 1: []}
    for rank in (0, 1):
        run(rank, lambda part, rank=rank: sent[rank].append(part) or torch.cat([part, part]))
    replies = [torch.cat(pair) for pair in zip(*sent.values(), strict=True)]
    return run(0, lambda part: replies.pop(0)), sent[0]


def test_raw_pixels_are_averaged_down_to_32():
    assert raw_pixels(torch.randn(2, 3, 24, 24)).shape == (2, 3 * 24 * 24)
    views = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(raw_pixels(views).view(2, 3, 32, 32)[0, 1, 3, 5], views[0, 1, 6:8, 10:12].mean())


def test_embedding_leaves_no_graph_and_keeps_order():
    features, label = torch.randn(33, 5), torch.arange(33) - 1
    weight = torch.eye(5).requires_grad_()
    samples = np.arange(33)[::-1].copy()
    parts = list(embed(lambda views: views @ weight, batches_of(features, label), samples))
    assert [len(part[0]) for part in parts] == [10, 10, 10, 3]
    embedded, labels, index = (torch.cat(part) for part in zip(*parts, strict=True))
    assert not embedded.requires_grad and embedded.dtype == torch.float32
    assert torch.equal(embedded, features.flip(0)) and torch.equal(labels, label.flip(0))
    assert index.tolist() == samples.tolist()


def test_bad_images_are_left_out_on_any_number_of_ranks():
    features, label = torch.randn(41, 5), torch.arange(41)
    center_crop_batches = batches_of(features, label, bad={7: 3, 40: 12})

    def run(rank, gather, world_size=2):
        parts = embed(identity, center_crop_batches, np.arange(41), gather, rank, world_size)
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    good = [place for place in range(41) if place not in (7, 40)]
    for embedded, labels, index in (run(0, identity, world_size=1), play_two_ranks(run)[0]):
        assert torch.equal(embedded, features[good]) and labels.tolist() == index.tolist() == good


def test_ranks_share_the_embedding_and_put_it_in_order():
    splits = {"train": clusters(41, 0, 0.8), "test": clusters(23, 1, 0.8)}

    def evaluator(rank, gather, world_size=2):
        return Evaluator(
            ("train", np.arange(41)),
            ("test", np.arange(23)),
            lambda split, samples: batches_of(*splits[split])(samples),
            gather,
            rank,
            world_size,
            k=5,
            max_bank=40,
        )

    alone = evaluator(0, identity, world_size=1)(identity)
    together, sent = play_two_ranks(lambda rank, gather: evaluator(rank, gather)(identity))
    assert sum(part.shape[0] for part in sent if part.dim() == 2) == 20 + 12, "each rank embeds its half"
    assert together == alone
    chosen = np.linspace(0, 40, 40).astype(int)
    bank = [each[chosen] for each in splits["train"]]
    assert alone["knn_top1"] == knn_top1(*bank, *splits["test"], k=5)


def test_the_table_has_a_row_per_kind_of_features():
    table = report_table({"untrained": {"knn_top1": 0.25, "linear_top1": 0.3}})
    assert table.row_count == 1 and table.columns[0].header == "features"


def test_scores_of_several_seeds_get_a_row_for_their_mean():
    results = [{"seed": seed, "l2": 0.1, "converged": seed > 0, **scores((6 + seed, 9), 10)} for seed in range(3)]
    record = {"results": results, "classes": 3, "over_seeds": over_seeds(results)}
    table = scores_table(record)
    assert record["over_seeds"]["top1"]["mean"] == 0.7 and record["over_seeds"]["top5"]["half_width_95"] == 0
    assert [column.header for column in table.columns] == ["seed", "l2", "top-1", "95 % over test images", "top-3"]
    shown = list(table.columns[2].cells)
    assert shown[:2] == ["0.6000 (not converged)", "0.7000"] and shown[3].startswith("0.7000 ± 0.24")
    assert scores_table(record | {"results": results[:1]}).row_count == 1


def test_whole_numbers_are_shown_whole():
    results = [{"k": 1234, "temperature": 0.07, **scores((6, 9), 10)}]
    table = scores_table({"results": results, "classes": 10})
    assert [next(iter(column.cells)) for column in table.columns[:2]] == ["1234", "0.07"]
