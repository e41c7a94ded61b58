from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError
from evaluation import EvalConfig, Evaluator, embed, evaluate_classifier, knn_top1, labeled_test_samples, raw_pixels
from evaluation.accuracy import over_seeds, scores
from evaluation.tables import report_table, scores_table
from tests.evaluation.clusters import clusters
from tests.evaluation.sessions import FakeSession, on_ranks


def batches_of(features, label, size=10, bad=None):
    """Stand-in for `center_crop_batches`: `bad` maps unreadable samples to their replacements."""

    def batches(samples):
        for first in range(0, len(samples), size):
            chosen = np.array([(bad or {}).get(each, each) for each in samples[first : first + size]])
            yield SimpleNamespace(views=features[chosen], label=label[chosen], index=torch.from_numpy(chosen))

    return batches


def identity(x):
    return x


def test_raw_pixels_are_averaged_down_to_32():
    assert raw_pixels(torch.randn(2, 3, 24, 24)).shape == (2, 3 * 24 * 24)
    views = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(raw_pixels(views).view(2, 3, 32, 32)[0, 1, 3, 5], views[0, 1, 6:8, 10:12].mean())


def test_embed_builds_no_graph_and_keeps_order():
    features, label = torch.randn(33, 5), torch.arange(33) - 1
    weight = torch.eye(5).requires_grad_()
    samples = np.arange(33)[::-1].copy()
    parts = list(embed(lambda views: views @ weight, batches_of(features, label), samples, FakeSession()))
    assert [len(part[0]) for part in parts] == [10, 10, 10, 3]
    embedded, labels, index = (torch.cat(part) for part in zip(*parts, strict=True))
    assert not embedded.requires_grad and embedded.dtype == torch.float32
    assert torch.equal(embedded, features.flip(0)) and torch.equal(labels, label.flip(0))
    assert index.tolist() == samples.tolist()


def test_unreadable_images_are_left_out_on_any_number_of_ranks():
    features, label = torch.randn(41, 5), torch.arange(41)
    batches = batches_of(features, label, bad={7: 3, 40: 12})
    good = [place for place in range(41) if place not in (7, 40)]

    def run(session):
        parts = embed(identity, batches, np.arange(41), session)
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    for world_size in (1, 2):
        for embedded, labels, index in on_ranks(world_size, run):
            assert torch.equal(embedded, features[good]) and labels.tolist() == index.tolist() == good


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_limit_on_unreadable_images_is_one_over_all_ranks(world_size):
    features, label = torch.randn(40, 5), torch.arange(40)
    batches = batches_of(features, label, bad={7: 3, 39: 12})  # with four ranks, two of the last one's ten

    def readable(session, max_bad):
        return sum(len(part[0]) for part in embed(identity, batches, np.arange(40), session, max_bad))

    def refusal(session):
        with pytest.raises(UserError) as error:
            readable(session, max_bad=0.049)
        return str(error.value)

    assert on_ranks(world_size, partial(readable, max_bad=0.05)) == [38] * world_size
    refusals = on_ranks(world_size, refusal)
    assert len(set(refusals)) == 1 and refusals[0].startswith("2 of 40 images to evaluate can't be read")


def test_ranks_share_the_embedding_and_restore_its_order():
    splits = {"train": clusters(41, 0, 0.8), "test": clusters(23, 1, 0.8)}

    def batches(split, samples):
        return batches_of(*splits[split])(samples)

    def run(session):
        train, test = ("train", np.arange(41)), ("test", np.arange(23))
        config = EvalConfig(k=5, max_bank=40)
        evaluator = Evaluator(train, test, batches, session, config, max_bad=0.0)
        return evaluator(identity), session.gathered_rows

    ((alone, _),) = on_ranks(1, run)
    together = on_ranks(2, run)
    assert together[0] == together[1] == (alone, 3 * (20 + 12)), "features, labels and samples of half of the images"
    chosen = np.linspace(0, 40, 40).astype(int)
    bank = [each[chosen] for each in splits["train"]]
    assert alone["knn_top1"] == knn_top1(*bank, *splits["test"], k=5)


def test_accuracy_of_a_classifier_on_one_and_two_ranks():
    features, label = clusters(41, 0, 3.0, classes=8, width=8)

    def run(session):
        classifier = torch.nn.Sequential(torch.nn.Dropout(0.5)).train()  # the features themselves, in evaluation mode
        scores = evaluate_classifier(classifier, batches_of(features, label), np.arange(41), session, 0.0)
        assert classifier.training
        return scores

    order = features.argsort(dim=1, descending=True)
    top1, top5 = ((order[:, :n] == label[:, None]).any(1).sum().item() / 41 for n in (1, 5))
    assert run(FakeSession()) == on_ranks(2, run)[1] == {"top1": top1, "top5": top5}
    test = SimpleNamespace(classes=["a", "b"], index={"label": np.array([1, -1, 0])})
    assert labeled_test_samples(test, ["a", "b"]).tolist() == [0, 2]
    assert not len(labeled_test_samples(test, ["b", "a"])) and not len(labeled_test_samples(None, ["a"]))


def test_report_table_has_a_row_per_kind_of_features():
    table = report_table({"untrained": {"knn_top1": 0.25, "linear_top1": 0.3}})
    assert table.row_count == 1 and table.columns[0].header == "features"


def test_scores_table_has_a_row_for_the_mean_over_seeds():
    results = [{"seed": seed, "l2": 0.1, "converged": seed > 0, **scores((6 + seed, 9), 10)} for seed in range(3)]
    record = {"results": results, "classes": 3, "over_seeds": over_seeds(results)}
    table = scores_table(record)
    assert [column.header for column in table.columns] == ["seed", "l2", "top-1", "95 % over test images", "top-3"]
    shown = list(table.columns[2].cells)
    assert shown[:2] == ["0.6000 (not converged)", "0.7000"] and shown[3].startswith("0.7000 ± 0.24")
    assert scores_table(record | {"results": results[:1]}).row_count == 1


def test_integers_are_shown_in_full():
    results = [{"k": 1234, "temperature": 0.07, **scores((6, 9), 10)}]
    table = scores_table({"results": results, "classes": 10})
    assert [next(iter(column.cells)) for column in table.columns[:2]] == ["1234", "0.07"]
