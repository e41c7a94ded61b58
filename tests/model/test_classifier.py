import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import model
from common import UserError
from tests.model.networks import randomize_batchnorm

SPEC = model.EncoderSpec("simclr_resnet18", {"num_classes": 0, "small_stem": True, "width": 0.125})
CLASSES = ["cat", "dog", "owl"]


def encoder_and_head(version="v2"):
    torch.manual_seed(0)
    encoder, head = model.create_encoder(SPEC), model.projection_head(model.HeadConfig(version, 48, 16), 64)
    randomize_batchnorm(encoder, head)
    return encoder, head


def content(path):
    """Metadata and weights of a file; bytes cannot be compared, because the order of the metadata varies."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return metadata, {key: value.tolist() for key, value in load_file(path).items()}


def norm(x, bn):
    return (x - bn.running_mean) / torch.sqrt(bn.running_var + bn.eps) * bn.weight + bn.bias


@pytest.mark.parametrize(("version", "from_layer"), [("v1", 0), ("v1", 1), ("v2", 0), ("v2", 1), ("v2", 2), ("v2", 3)])
def test_kept_layers_of_the_head(version, from_layer):
    encoder, head = encoder_and_head(version)
    classifier = model.create_classifier(encoder, head, from_layer, features=64, classes=3)
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
            x = norm(x @ head.fc3.weight.T, head.bn3)  # z itself: no ReLU follows
        torch.testing.assert_close(classifier(images), x @ classifier.fc.weight.T, rtol=1e-10, atol=1e-10)
    kept = [name for name, _ in classifier.head.named_parameters()]
    assert kept == [name for name, _ in head.named_parameters() if int(name[2]) <= from_layer]


def test_logits_start_at_zero_and_the_encoder_learns_from_the_second_step_on():
    encoder, head = encoder_and_head()
    classifier = model.create_classifier(encoder, head, 1, features=64, classes=3)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1)
    for step in range(2):
        logits = classifier(images)
        assert logits.shape == (4, 3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        nonzero = [bool(tensor.any()) for tensor in (logits, encoder.conv1.weight.grad, head.fc1.weight.grad)]
        assert nonzero == [step == 1] * 3
        optimizer.step()


@pytest.mark.parametrize("from_layer", [0, 1, 3])
def test_classifier_round_trip(tmp_path, from_layer):
    encoder, head = encoder_and_head()
    classifier = model.create_classifier(encoder, head if from_layer else None, from_layer, features=64, classes=3)
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
    assert content(tmp_path / "again.safetensors") == content(path)


def test_number_of_class_names_must_match(tmp_path):
    classifier = model.create_classifier(encoder_and_head()[0], None, 0, features=64, classes=4)
    with pytest.raises(ValueError, match="3 names for 4 classes"):
        model.save_classifier(classifier, SPEC, CLASSES, tmp_path / "model.safetensors")


@pytest.mark.parametrize(("version", "layer"), [("v1", 3), ("v2", 4), ("v2", -1)])
def test_layers_that_the_head_does_not_have(version, layer):
    encoder, head = encoder_and_head(version)
    last = 2 if version == "v1" else 3
    with pytest.raises(UserError, match=f"from layer {layer} .*--start.from-layer must be 0 to {last}\\."):
        model.create_classifier(encoder, head, layer, features=64, classes=3)
    with pytest.raises(UserError, match="with 0 layers"):
        model.create_classifier(encoder, None, 1, features=64, classes=3)


@pytest.mark.parametrize("kind", ["classifier", "probe"])
def test_autocast_does_not_round_logits(kind):
    """In bf16, logits of 100 and 100.1 would be equal: the neighbors of 100 are 99.5 and 100.5."""
    encoder, head = encoder_and_head()
    if kind == "classifier":
        net = model.create_classifier(encoder, None, 0, features=64, classes=2)
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


def test_widths_of_encoder_and_head_must_match():
    encoder, head = encoder_and_head()
    with pytest.raises(UserError, match="takes 64 features, but the encoder has 128"):
        model.create_classifier(encoder, head, 1, features=128, classes=3)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_head_round_trip(tmp_path, version):
    head = encoder_and_head(version)[1]
    model.save_head(head, tmp_path / "head.safetensors")
    again = model.load_head(tmp_path / "head.safetensors")
    assert [name for name, _ in again.named_children()] == [name for name, _ in head.named_children()]
    assert not again.training and not list(again.children())[-1].bias.requires_grad
    h = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(again(h), head.eval()(h))


def test_head_with_synchronized_batch_norm_is_saved_alike(two_ranks, tmp_path):
    head = encoder_and_head()[1]
    model.save_head(head, tmp_path / "one.safetensors")
    model.save_head(model.synchronize_batchnorm(head), tmp_path / "ranks.safetensors")
    assert content(tmp_path / "ranks.safetensors") == content(tmp_path / "one.safetensors")


def test_wrong_files(tmp_path):
    encoder, head = encoder_and_head()
    files = {kind: tmp_path / f"{kind}.safetensors" for kind in ("encoder", "head", "classifier")}
    model.save_encoder(encoder, SPEC, files["encoder"])
    model.save_head(head, files["head"])
    model.save_classifier(model.create_classifier(encoder, head, 1, 64, 3), SPEC, CLASSES, files["classifier"])
    load = {"encoder": model.load_encoder, "head": model.load_head, "classifier": model.load_classifier}
    for wanted, loader in load.items():
        for held, path in files.items():
            if held == wanted:
                loader(path)
                continue
            with pytest.raises(UserError, match=f"{held}.safetensors holds a.* {held}; use a.* {wanted}"):
                loader(path)
        with pytest.raises(UserError, match=r"There is no file .* written by (StreamCLR|finetune.py or distill.py)"):
            loader(tmp_path / "none.safetensors")
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match="weights not written by StreamCLR"):
            loader(tmp_path / "other.safetensors")
        damaged = tmp_path / "damaged.safetensors"
        damaged.write_bytes(files[wanted].read_bytes()[:-100])
        with pytest.raises(UserError, match="damaged or not a safetensors file"):
            loader(damaged)


def test_weights_that_do_not_match_the_metadata(tmp_path):
    path = tmp_path / "encoder.safetensors"
    model.save_encoder(encoder_and_head()[0], SPEC._replace(kwargs={**SPEC.kwargs, "width": 0.25}), path)
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
def test_damaged_metadata(tmp_path, key, text):
    encoder, head = encoder_and_head()
    path, damaged = tmp_path / "model.safetensors", tmp_path / "damaged.safetensors"
    model.save_classifier(model.create_classifier(encoder, head, 1, 64, 3), SPEC, CLASSES, path)
    metadata = content(path)[0]
    for changed in ({**metadata, key: text}, {name: value for name, value in metadata.items() if name != key}):
        save_file(load_file(path), damaged, changed)
        with pytest.raises(UserError, match=r"metadata of .*damaged|holds") as error:
            model.load_classifier(damaged)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "shape"])
def test_unexpected_tensors(tmp_path, change):
    path = tmp_path / "head.safetensors"
    model.save_head(encoder_and_head()[1], path)
    metadata, state = content(path)[0], load_file(path)
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
def test_weights_that_are_not_finite(tmp_path, value):
    encoder = encoder_and_head()[0]
    encoder.layer1[0].bn1.running_var[0] = value
    model.save_encoder(encoder, SPEC, tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match=r"1 tensors .* layer1\.0\.bn1\.running_var"):
        model.load_encoder(tmp_path / "encoder.safetensors")


def test_a_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "encoder.safetensors"
    (target / "folder").mkdir(parents=True)
    with pytest.raises(UserError, match=r"encoder\.safetensors can't be written"):
        model.save_encoder(encoder_and_head()[0], SPEC, target)
    assert list(tmp_path.iterdir()) == [target]
