import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import model
from common import UserError

SPEC = ("simclr_resnet18", {"num_classes": 0, "small_stem": True, "width": 0.125})
CLASSES = ["cat", "dog", "owl"]


def parts(version="v2"):
    torch.manual_seed(0)
    encoder, head = model.create_encoder(SPEC), model.projection_head(version, 64, 48, 16)
    for part in (encoder, head):  # statistics and scales such as training leaves, none of them 0 or 1
        for module in part.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return encoder, head


def contents(path):
    """Metadata and weights of a file; its bytes won't do, since metadata has no fixed order."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return metadata, {key: value.tolist() for key, value in load_file(path).items()}


def norm(x, bn):
    return (x - bn.running_mean) / torch.sqrt(bn.running_var + bn.eps) * bn.weight + bn.bias


@pytest.mark.parametrize(("version", "from_layer"), [("v1", 0), ("v1", 1), ("v2", 0), ("v2", 1), ("v2", 2), ("v2", 3)])
def test_the_kept_layers_are_those_of_the_head(version, from_layer):
    encoder, head = parts(version)
    classifier = model.fine_tuned(encoder, head, from_layer, features=64, classes=3)
    assert classifier.training and classifier.encoder.training
    nn.init.normal_(classifier.fc.weight)
    classifier.double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        x = encoder(images)
        if from_layer >= 1:
            x = norm(x @ head.fc1.weight.T, head.bn1).relu()
        if from_layer >= 2:
            x = norm(x @ head.fc2.weight.T, head.bn2).relu()
        if from_layer == 3:
            x = norm(x @ head.fc3.weight.T, head.bn3)  # z itself, which no ReLU follows
        torch.testing.assert_close(classifier(images), x @ classifier.fc.weight.T, rtol=1e-10, atol=1e-10)
    kept = [name for name, _ in classifier.head.named_parameters()]
    assert kept == [name for name, _ in head.named_parameters() if int(name[2]) <= from_layer]


def test_all_classes_begin_alike_and_the_encoder_learns_from_the_second_step_on():
    encoder, head = parts()
    classifier = model.fine_tuned(encoder, head, 1, features=64, classes=3)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1)
    for step in range(2):
        logits = classifier(images)
        assert logits.shape == (4, 3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        moved = [bool(tensor.any()) for tensor in (logits, encoder.conv1.weight.grad, head.fc1.weight.grad)]
        assert moved == [step == 1] * 3
        optimizer.step()


@pytest.mark.parametrize("from_layer", [0, 1, 3])
def test_a_saved_classifier_comes_back(tmp_path, from_layer):
    encoder, head = parts()
    classifier = model.fine_tuned(encoder, head if from_layer else None, from_layer, features=64, classes=3)
    nn.init.normal_(classifier.fc.weight)
    classifier.to(memory_format=torch.channels_last)
    path = tmp_path / "model.safetensors"
    model.save_classifier(classifier, SPEC, CLASSES, path)
    assert list(tmp_path.iterdir()) == [path]
    again, classes = model.load_classifier(path)
    assert classes == CLASSES and not again.training and not again.encoder.training
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.to(memory_format=torch.channels_last)(images), classifier.eval()(images))
    model.save_classifier(again, SPEC, classes, tmp_path / "again.safetensors")
    assert contents(tmp_path / "again.safetensors") == contents(path)


def test_names_and_logits_must_agree(tmp_path):
    classifier = model.fine_tuned(parts()[0], None, 0, features=64, classes=4)
    with pytest.raises(ValueError, match="3 names for 4 classes"):
        model.save_classifier(classifier, SPEC, CLASSES, tmp_path / "model.safetensors")


@pytest.mark.parametrize(("version", "layer"), [("v1", 3), ("v2", 4), ("v2", -1)])
def test_a_layer_that_the_head_does_not_have(version, layer):
    encoder, head = parts(version)
    with pytest.raises(
        UserError, match=f"from layer {layer} .*use --start.from-layer 0 to {2 if version == 'v1' else 3}"
    ):
        model.fine_tuned(encoder, head, layer, features=64, classes=3)
    with pytest.raises(UserError, match="head that is not there"):
        model.fine_tuned(encoder, None, 1, features=64, classes=3)


@pytest.mark.parametrize("kind", ["classifier", "probe"])
def test_autocast_does_not_round_the_scores(kind):
    """Scores of 100 and 100.1 are one number in bf16, whose next ones are 99.5 and 100.5."""
    encoder, head = parts()
    if kind == "classifier":
        net = model.fine_tuned(encoder, None, 0, features=64, classes=2)
        layer = net.fc
    else:
        net = model.SimCLR(encoder, head, 64, classes=2)
        layer = net.probe
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([100.0, 100.1]))
    with torch.autocast("cpu", torch.bfloat16):
        scores = net(torch.randn(2, 3, 16, 16))
    scores = scores if kind == "classifier" else scores[1]
    assert torch.equal(scores, layer.bias.detach().expand(2, 2))
    scores.float()[:, 1].sum().backward()
    assert layer.weight.grad.any() and layer.weight.grad.dtype == torch.float32


def test_encoder_and_head_must_fit():
    encoder, head = parts()
    with pytest.raises(UserError, match="takes 64 features, the encoder has 128"):
        model.fine_tuned(encoder, head, 1, features=128, classes=3)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_saved_head_comes_back(tmp_path, version):
    head = parts(version)[1]
    model.save_head(head, tmp_path / "head.safetensors")
    again = model.load_head(tmp_path / "head.safetensors")
    assert [name for name, _ in again.named_children()] == [name for name, _ in head.named_children()]
    assert not again.training and not list(again.children())[-1].bias.requires_grad
    h = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(again(h), head.eval()(h))


def test_a_head_whose_norms_span_ranks_is_saved_alike(tmp_path):
    head = parts()[1]
    model.save_head(head, tmp_path / "one.safetensors")
    model.save_head(model.synchronize_batchnorm(head, torch.device("cpu")), tmp_path / "ranks.safetensors")
    assert contents(tmp_path / "ranks.safetensors") == contents(tmp_path / "one.safetensors")


def test_a_wrong_file_is_said_in_a_sentence(tmp_path):
    encoder, head = parts()
    files = {kind: tmp_path / f"{kind}.safetensors" for kind in ("encoder", "head", "classifier")}
    model.save_encoder(encoder, SPEC, files["encoder"])
    model.save_head(head, files["head"])
    model.save_classifier(model.fine_tuned(encoder, head, 1, 64, 3), SPEC, CLASSES, files["classifier"])
    load = {"encoder": model.load_encoder, "head": model.load_head, "classifier": model.load_classifier}
    for wanted, loader in load.items():
        for held, path in files.items():
            if held == wanted:
                loader(path)
                continue
            with pytest.raises(UserError, match=f"{held}.safetensors holds a.* {held}: use a.* {wanted}"):
                loader(path)
        with pytest.raises(UserError, match="There is no file"):
            loader(tmp_path / "none.safetensors")
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match="weights not written by StreamCLR"):
            loader(tmp_path / "other.safetensors")
        damaged = tmp_path / "damaged.safetensors"
        damaged.write_bytes(files[wanted].read_bytes()[:-100])
        with pytest.raises(UserError, match="damaged or not a safetensors file"):
            loader(damaged)


def test_weights_of_another_width_are_said_in_a_sentence(tmp_path):
    path = tmp_path / "encoder.safetensors"
    model.save_encoder(parts()[0], (SPEC[0], {**SPEC[1], "width": 0.25}), path)
    with pytest.raises(UserError, match="do not match its metadata"):
        model.load_encoder(path)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("timm_kwargs", "{"),
        ("timm_kwargs", "[]"),
        ("timm_kwargs", '{"pretrained": true}'),
        ("timm_kwargs", '{"checkpoint_path": "other.pth"}'),
        ("timm_name", "hf-hub:somebody/something"),
        ("head", '{"version": "v2"}'),
        ("head", "[1]"),
        ("classes", "{"),
        ("classes", "3"),
    ],
)
def test_damaged_metadata_is_said_in_a_sentence(tmp_path, key, text):
    encoder, head = parts()
    path, damaged = tmp_path / "model.safetensors", tmp_path / "damaged.safetensors"
    model.save_classifier(model.fine_tuned(encoder, head, 1, 64, 3), SPEC, CLASSES, path)
    metadata = contents(path)[0]
    for changed in ({**metadata, key: text}, {name: value for name, value in metadata.items() if name != key}):
        save_file(load_file(path), damaged, changed)
        with pytest.raises(UserError, match=r"metadata of .*damaged|holds") as error:
            model.load_classifier(damaged)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "shape"])
def test_other_tensors_than_expected_are_said_in_a_sentence(tmp_path, change):
    path = tmp_path / "head.safetensors"
    model.save_head(parts()[1], path)
    metadata, state = contents(path)[0], load_file(path)
    weight = state.pop("fc1.weight")
    state |= {
        "missing": {},
        "extra": {"fc1.weight": weight, "fc9.weight": weight.clone()},
        "renamed": {"fc9.weight": weight},
        "shape": {"fc1.weight": weight[1:].clone()},
    }[change]
    save_file(state, path, metadata)
    with pytest.raises(UserError, match=r"do not match its metadata \(.*fc[19]\.weight"):
        model.load_head(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    encoder = parts()[0]
    encoder.layer1[0].bn1.running_var[0] = value
    model.save_encoder(encoder, SPEC, tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match=r"1 tensors .* layer1\.0\.bn1\.running_var"):
        model.load_encoder(tmp_path / "encoder.safetensors")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    target = tmp_path / "encoder.safetensors"
    (target / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match=r"encoder\.safetensors can't be written"):
        model.save_encoder(parts()[0], SPEC, target)
    assert list(tmp_path.iterdir()) == [target]
