import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import model
from common import UserError
from engine import checkpoint
from tests.model.networks import spec


@pytest.mark.parametrize("name", ["resnet10t", "resnet18", "resnet18d", "resnet50", "resnet50d"])
def test_small_images_use_the_small_stem(name):
    encoder = model.create_encoder(spec(name, 32))
    assert encoder.conv1.kernel_size == (3, 3) and encoder.conv1.stride == (1, 1) and encoder.conv1.padding == (1, 1)
    plain = timm.create_model(name, num_classes=0)
    assert encoder.num_features == plain.num_features
    stages = encoder.forward_intermediates(torch.zeros(1, 3, 32, 32), intermediates_only=True)
    assert stages[1].shape[-1] == 32, "neither stem nor pooling reduces the resolution before the first stage"
    for key, value in plain.state_dict().items():
        assert key.startswith("conv1.") or encoder.state_dict()[key].shape == value.shape, key


def test_large_images_use_timms_own_model():
    assert spec("resnet50", 224) == ("resnet50", {"num_classes": 0})


def test_stem_can_be_chosen():
    assert spec("resnet18", 32, stem="standard") == ("resnet18", {"num_classes": 0})
    assert spec("resnet18", 224, stem="small")[0] == "simclr_resnet18"


@pytest.mark.parametrize("width", [0.25, 2.0])
@pytest.mark.parametrize(
    ("name", "first"),
    [("resnet18", ""), ("resnet50", ""), ("resnet10t", "0."), ("resnet34d", "0."), ("resnet50d", "0.")],
)
def test_width_multiplies_every_channel_count(name, first, width):
    plain = timm.create_model(name, num_classes=0).state_dict()
    wide = model.create_encoder(spec(name, 224, width=width)).state_dict()
    assert wide.keys() == plain.keys()
    for key, value in plain.items():
        expected = [side * width for side in value.shape]
        if key == f"conv1.{first}weight":
            expected[1:] = value.shape[1:]  # images keep three channels
        elif value.ndim == 4:
            expected[2:] = value.shape[2:]
        assert list(wide[key].shape) == expected, key


@pytest.mark.parametrize("width", [0.05, 0.2, 0.33, 1.1])
def test_odd_widths_keep_the_blocks_of_a_resnet(width):
    """An odd number of channels, which the deep stem cannot have, would add a projection to the first shortcut."""
    plain = timm.create_model("resnet18", num_classes=0).state_dict()
    wide = model.create_encoder(spec("resnet18", 32, width=width)).state_dict()
    assert wide.keys() == plain.keys()
    assert wide["conv1.weight"].shape[0] == wide["layer1.0.conv1.weight"].shape[0]


@pytest.mark.parametrize("size", [32, 224])
def test_registered_name_is_equivalent_to_the_resnet(size):
    assert spec("simclr_resnet18", size) == spec("resnet18", size)


def test_layers_that_share_weights_are_saved(tmp_path):
    """safetensors refuses shared memory, which CoaT has; a run would fail only at its end."""
    coat = spec("coat_tiny", 32)
    encoder = model.create_encoder(coat)
    assert encoder.cpe1.proj.weight is encoder.serial_blocks1[0].cpe.proj.weight
    model.save_encoder(encoder, coat, tmp_path / "encoder.safetensors")
    again = model.load_encoder(tmp_path / "encoder.safetensors")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), encoder.eval()(x))
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1).save(1, checkpoint.state_tensors(encoder, []), {})
    other = model.create_encoder(coat).eval()
    checkpoint.load_state_tensors(checkpoint.load(saved)[0], other, [])
    with torch.no_grad():
        assert torch.equal(other(x), encoder(x))


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 32), ("resnet18", 96), ("vit_tiny_patch16_224", 96), ("convnext_atto", 64)]
)
def test_saved_weights_load_strictly_into_timm(tmp_path, name, size):
    encoder = model.create_encoder(spec(name, size)).eval()
    model.save_encoder(encoder, spec(name, size), tmp_path / "encoder.safetensors")
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
    ("name", "options", "message"),
    [
        ("resnet19", {}, r"timm has no encoder 'resnet19' \(did you mean resnet18 or .*use one of"),
        ("vit_tiny", {}, "did you mean vit_tiny_"),
        ("", {}, "timm has no encoder ''; use"),
        ("resnet18.a1_in1k", {}, "names the pretrained weights 'a1_in1k'.*use resnet18\\."),
        ("resnet18.", {}, "names the pretrained weights"),
        ("convnext_atto", {"width": 2.0}, "width multiplier.*--encoder.width 1"),
        ("vit_tiny_patch16_224", {"stem": "small"}, "small stem"),
    ],
)
def test_unsupported_architectures(name, options, message):
    with pytest.raises(UserError, match=message):
        spec(name, 224, **options)


def test_a_stem_without_channels_is_refused():
    assert model.create_encoder(spec("resnet10t", 96, width=0.11)).conv1[0].out_channels == 3
    with pytest.raises(UserError, match=r"its standard stem needs a width of 0\.11 or more"):
        model.create_encoder(spec("resnet10t", 96, width=0.1))


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("mobilenetv3_small_050", 64), ("convnext_atto", 32)])
def test_feature_dim_is_the_width_of_the_output(name, size):
    encoder = model.create_encoder(spec(name, size))
    features = model.feature_dim(encoder, size)
    assert encoder(torch.randn(2, 3, size, size)).shape == (2, features) and encoder.training
    assert model.feature_dim(encoder.eval(), size) == features and not encoder.training


@pytest.mark.parametrize(
    ("name", "size", "options", "first"),
    [
        ("resnet18", 96, {"width": 0.125}, "conv1.weight"),
        ("resnet18", 32, {"width": 0.125}, "conv1.weight"),
        ("resnet50", 96, {"width": 0.125, "selective_kernels": True}, "conv1.0.weight"),
        ("vit_tiny_patch16_224", 32, {}, "patch_embed.proj.weight"),
    ],
)
def test_the_first_layer_takes_the_channels_of_the_images(tmp_path, name, size, options, first):
    """Everything else is that of the encoder for RGB images, whose arguments and weights stay as they were."""
    rgb, wide = (model.encoder_spec(model.EncoderConfig(name, **options), size, channels) for channels in (3, 8))
    assert "in_chans" not in rgb.kwargs and wide == (rgb.name, {**rgb.kwargs, "in_chans": 8}) and wide.channels == 8
    encoder, plain = model.create_encoder(wide), model.create_encoder(rgb).state_dict()
    assert encoder.state_dict()[first].shape[1] == 8
    assert {key: value.shape for key, value in encoder.state_dict().items() if key != first} == {
        key: value.shape for key, value in plain.items() if key != first
    }
    model.save_encoder(encoder, wide, tmp_path / "encoder.safetensors")
    x, loaded = torch.randn(2, 8, size, size), model.load_encoder(tmp_path / "encoder.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), encoder.eval()(x))
    assert model.feature_dim(loaded, size, 8) == loaded(x).shape[1]


def test_views_too_small_for_an_encoder():
    encoder = model.create_encoder(model.EncoderSpec("inception_v3", {"num_classes": 0}))
    with pytest.raises(UserError, match=r"can't take views of 32 px \(.*change --views.size"):
        model.feature_dim(encoder, 32)


def test_arguments_that_timm_refuses():
    with pytest.raises(UserError, match="can't build"):
        model.create_encoder(model.EncoderSpec("vit_tiny_patch16_224", {"num_classes": 0, "nonsense": 1}))


@pytest.mark.parametrize("width", [0, 33, float("inf"), float("nan")])
def test_widths_out_of_range(width):
    with pytest.raises(UserError, match=rf"--encoder.width is {width}; it must be at (least 0.05|most 32)\."):
        model.EncoderConfig(width=width)


def test_errors_of_timm_without_a_message():
    """HaloNet raises an empty AssertionError for images smaller than its windows."""
    with pytest.raises(UserError, match=r"32 px \(AssertionError\); change"):
        model.feature_dim(model.create_encoder(spec("eca_halonext26ts", 32)), 32)


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
def test_encoders_must_return_one_vector_per_view(output, found):
    with pytest.raises(UserError, match=f"returns .*{found}.* instead of one vector each"):
        model.feature_dim(Returning(output), 32)
