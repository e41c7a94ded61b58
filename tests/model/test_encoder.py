import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import model
from common import UserError
from engine import checkpoint


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


@pytest.mark.parametrize("width", [0.05, 0.2, 0.33, 1.1])
def test_odd_widths_keep_the_blocks_of_a_resnet(width):
    """Channels that the stem could not have would bring a projection into the first shortcut."""
    plain = timm.create_model("resnet18", num_classes=0).state_dict()
    wide = model.create_encoder(model.encoder_spec("resnet18", 32, width=width)).state_dict()
    assert wide.keys() == plain.keys()
    assert wide["conv1.weight"].shape[0] == wide["layer1.0.conv1.weight"].shape[0]


@pytest.mark.parametrize("size", [32, 224])
def test_the_registered_name_of_a_resnet_means_the_resnet(size):
    assert model.encoder_spec("simclr_resnet18", size) == model.encoder_spec("resnet18", size)


def test_layers_that_share_weights_are_saved(tmp_path):
    """CoaT's: safetensors refuses shared memory, and the refusal would come at the end of a run."""
    spec = model.encoder_spec("coat_tiny", 32)
    encoder = model.create_encoder(spec)
    assert encoder.cpe1.proj.weight is encoder.serial_blocks1[0].cpe.proj.weight
    model.save_encoder(encoder, spec, tmp_path / "encoder.safetensors")
    again = model.load_encoder(tmp_path / "encoder.safetensors")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), encoder.eval()(x))
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1).save(1, checkpoint.pack(encoder, []), {})
    other = model.create_encoder(spec).eval()
    checkpoint.unpack(checkpoint.load(saved)[0], other, [])
    with torch.no_grad():
        assert torch.equal(other(x), encoder(x))


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
        (("resnet19", 224), r"timm has no encoder 'resnet19' \(did you mean resnet18 or .*use one of"),
        (("vit_tiny", 224), "did you mean vit_tiny_"),
        (("", 224), "timm has no encoder '': use"),
        (("resnet18.a1_in1k", 32), "names the pretrained weights 'a1_in1k'.*use resnet18\\."),
        (("resnet18.", 32), "names the pretrained weights"),
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
    features = model.feature_dim(encoder, size)
    assert encoder(torch.randn(2, 3, size, size)).shape == (2, features) and encoder.training
    assert model.feature_dim(encoder.eval(), size) == features and not encoder.training


def test_views_too_small_for_an_encoder_are_said_in_a_sentence():
    encoder = model.create_encoder(("inception_v3", {"num_classes": 0}))
    with pytest.raises(UserError, match=r"can't take views of 32 px \(.*change --views.size"):
        model.feature_dim(encoder, 32)


def test_an_impossible_size_is_said_in_a_sentence():
    with pytest.raises(UserError, match="can't build"):
        model.create_encoder(("vit_tiny_patch16_224", {"num_classes": 0, "nonsense": 1}))


@pytest.mark.parametrize("width", [1e9, float("inf")])
def test_an_impossible_width_is_said_in_a_sentence(width):
    with pytest.raises(UserError, match="can't build") as error:
        model.create_encoder(model.encoder_spec("resnet18", 32, width=width))
    assert "\n" not in str(error.value)


def test_whatever_timm_raises_becomes_a_sentence():
    """HaloNet's windows do not fit small images, which timm says by an assertion without words."""
    with pytest.raises(UserError, match=r"32 px \(AssertionError\): change"):
        model.feature_dim(model.create_encoder(model.encoder_spec("eca_halonext26ts", 32)), 32)


class Returning(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


@pytest.mark.parametrize(
    ("output", "found"),
    [(torch.zeros(2, 5, 1, 1), r"shape \(2, 5, 1, 1\)"), (torch.zeros(6, 5), r"\(6, 5\)"), ((1, 2), "tuple")],
)
def test_an_encoder_must_return_one_vector_per_view(output, found):
    with pytest.raises(UserError, match=f"returns .*{found}.* instead of one vector each"):
        model.feature_dim(Returning(output), 32)
