import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import model
from errors import UserError


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_small_images_get_the_small_stem(name):
    encoder = model.create_encoder(model.encoder_spec(name, image_size=32))
    assert encoder.conv1.kernel_size == (3, 3) and encoder.conv1.stride == (1, 1) and encoder.conv1.padding == (1, 1)
    plain = timm.create_model(name, num_classes=0)
    assert encoder.num_features == plain.num_features
    stages = encoder.forward_intermediates(torch.zeros(1, 3, 32, 32), intermediates_only=True)
    assert stages[1].shape[-1] == 32, "neither stem nor pooling may shrink the image before the first stage"
    for key, value in plain.state_dict().items():
        assert key == "conv1.weight" or encoder.state_dict()[key].shape == value.shape, key


def test_large_images_get_timms_own_model():
    spec = model.encoder_spec("resnet50", image_size=224)
    assert spec == ("resnet50", {"num_classes": 0})


def test_stem_can_be_chosen():
    assert model.encoder_spec("resnet18", 32, stem="standard") == ("resnet18", {"num_classes": 0})
    assert model.encoder_spec("resnet18", 224, stem="small")[0] == "simclr_resnet18"


@pytest.mark.parametrize("width", [0.25, 2.0])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_width_multiplies_every_channel_count(name, width):
    plain = timm.create_model(name, num_classes=0).state_dict()
    wide = model.create_encoder(model.encoder_spec(name, 224, width=width)).state_dict()
    assert wide.keys() == plain.keys()
    for key, value in plain.items():
        expected = [side * width for side in value.shape]
        if key == "conv1.weight":
            expected[1:] = value.shape[1:]  # images keep three channels
        elif value.ndim == 4:
            expected[2:] = value.shape[2:]
        assert list(wide[key].shape) == expected, key


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 32), ("resnet18", 96), ("vit_tiny_patch16_224", 96), ("convnext_atto", 64)]
)
def test_saved_weights_load_strictly_into_timm(tmp_path, name, size):
    spec = model.encoder_spec(name, size)
    encoder = model.create_encoder(spec).eval()
    model.save_encoder(encoder, spec, tmp_path / "encoder.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.safetensors"]
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        metadata = file.metadata()
    again = timm.create_model(metadata["timm_name"], **json.loads(metadata["timm_kwargs"])).eval()
    again.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(again(x), encoder(x))
        assert torch.equal(model.load_encoder(tmp_path / "encoder.safetensors")(x), encoder(x))
        assert encoder(x).shape == (2, encoder.num_features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet19", 224), "timm has no encoder 'resnet19'.*choose"),
        (("convnext_atto", 224, "auto", 2.0), "width multiplier.*--encoder.width 1"),
        (("vit_tiny_patch16_224", 224, "small"), "small stem"),
    ],
)
def test_what_cannot_be_built_is_said_in_a_sentence(arguments, message):
    with pytest.raises(UserError, match=message):
        model.encoder_spec(*arguments)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("mobilenetv3_small_050", 64), ("convnext_atto", 32)])
def test_the_width_of_h_is_that_of_its_output(name, size):
    encoder = model.create_encoder(model.encoder_spec(name, size))
    features = model.representation_width(encoder, size)
    assert encoder(torch.randn(2, 3, size, size)).shape == (2, features) and encoder.training


def test_views_too_small_for_an_encoder_are_said_in_a_sentence():
    encoder = model.create_encoder(("inception_v3", {"num_classes": 0}))
    with pytest.raises(UserError, match=r"can't take views of 32 px \(.*change --views.size"):
        model.representation_width(encoder, 32)


def test_an_impossible_size_is_said_in_a_sentence():
    with pytest.raises(UserError, match="can't build"):
        model.create_encoder(("vit_tiny_patch16_224", {"num_classes": 0, "nonsense": 1}))
