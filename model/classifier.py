"""Classifiers for fine-tuning and distillation: an encoder, the first layers of its projection head, a linear layer.

SimCLR v1 fine-tunes from h. SimCLR v2 fine-tunes from the first layer of its deeper head, which becomes part of the
encoder (arXiv 2006.10029, section 2, "Fine-tuning": f_task(x) = W_task relu(W1 f(x))).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .common import UserError, check_range
from .encoder import (
    EncoderConfig,
    EncoderSpec,
    create_encoder,
    encoder_spec,
    feature_dim,
    load_encoder,
    read_spec,
    spec_from_metadata,
)
from .head import head_from_spec, head_spec, load_head
from .weights import load_strictly, read_weights, reading_metadata, write_weights


@dataclass(frozen=True)
class StartConfig:
    """Initial weights of a classifier."""

    run: str = ""
    """Run folder of a finished pretraining; empty for random weights."""
    from_layer: int = 0
    """Number of layers of its projection head to keep below the new layer: 0 starts from h; SimCLR v2 keeps 1."""

    def __post_init__(self) -> None:
        check_range("--start.from-layer", self.from_layer, 0, 10**9)


class Classifier(nn.Module):
    """Images -> logits; build it with `create_classifier`, `start_classifier` or `load_classifier`.

    Attributes:
        encoder: (N, C, H, W) -> h (N, features).
        head: first layers of a projection head; empty for fine-tuning from h.
        fc: linear classification layer.
        kept: `head_spec` of the whole head, and under "layers" how many of its layers are kept; None if none are.
    """

    def __init__(self, encoder: nn.Module, head: nn.Sequential, fc: nn.Linear, kept: dict | None):
        super().__init__()
        self.encoder, self.head, self.fc, self.kept = encoder, head, fc, kept

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, classes)."""
        h = self.encoder(images)  # (N, features)
        x = self.head(h)  # (N, width of the last kept layer)
        # bf16 has 8 significant bits: logits of different classes would tie, and a temperature of 0.1 would magnify the
        # rounding error tenfold
        with torch.autocast(x.device.type, enabled=False):
            return self.fc(x.to(self.fc.weight.dtype))


def create_classifier(
    encoder: nn.Module, head: nn.Sequential | None, from_layer: int, features: int, classes: int
) -> Classifier:
    """Put a new linear layer on top of an encoder and the first layers of its projection head.

    The classifier shares the modules of `encoder` and `head` and is in training mode. Its last layer is initialized to
    zero, as in the official fine-tuning commands (`zero_init_logits_layer`): all classes start equally likely, whatever
    the scale of the features.

    Args:
        encoder: (N, C, H, W) -> h (N, features), pretrained or not.
        head: the encoder's projection head; None if none of its layers are kept.
        from_layer: number of layers of the head to keep, each with its batch norm and ReLU: 0 fine-tunes from h, 1 is
            SimCLR v2's choice.
        features: width of h.
        classes: number of classes.

    Raises:
        UserError: the head has fewer layers or another input width, or there is no head.
    """
    layers = 0 if head is None else sum(isinstance(module, nn.Linear) for module in head)
    if not 0 <= from_layer <= layers:
        raise UserError(
            f"Can't fine-tune from layer {from_layer} of a projection head with {layers} layers; "
            f"--start.from-layer must be 0 to {layers}."
        )
    kept_layers, width, kept = nn.Sequential(), features, None
    if from_layer:
        kept = {**head_spec(head), "layers": from_layer}
        if kept["features"] != features:
            raise UserError(
                f"The projection head takes {kept['features']} features, but the encoder has {features}; use both from "
                "the same run."
            )
        for name, module in head.named_children():
            if int(name[-1]) <= from_layer:
                kept_layers.add_module(name, module)
                width = module.out_features if isinstance(module, nn.Linear) else width
    fc = nn.Linear(width, classes)
    nn.init.zeros_(fc.weight)
    nn.init.zeros_(fc.bias)
    return Classifier(encoder, kept_layers, fc, kept).train()


def start_classifier(
    start: StartConfig, encoder: EncoderConfig, image_size: int, classes: int, channels: int = 3
) -> tuple[Classifier, EncoderSpec]:
    """Build the classifier that a fine-tuning or distillation starts from, in training mode.

    Args:
        start: pretraining run that provides the weights, or random weights.
        encoder: architecture for random weights; ignored with a pretraining run.
        image_size: side of a view in pixels.
        classes: number of classes.
        channels: channels of the images.

    Returns:
        The classifier, and the spec of its encoder.

    Raises:
        UserError: the run is not finished, has fewer layers in its head, or its encoder does not accept such views or
            images of so many channels.
    """
    if not start.run:
        spec = encoder_spec(encoder, image_size, channels)
        network, head = create_encoder(spec), None
    else:
        file = Path(start.run) / "encoder.safetensors"
        spec, network = read_spec(file), load_encoder(file)
        if spec.channels != channels:
            raise UserError(
                f"The encoder in {start.run} takes {spec.channels}-channel images, but the data has {channels}-channel "
                "images; use --data with images like those that it was trained on, or another --start.run."
            )
        head = load_head(Path(start.run) / "head.safetensors") if start.from_layer else None
    return create_classifier(network, head, start.from_layer, feature_dim(network, image_size, channels), classes), spec


def save_classifier(classifier: Classifier, spec: EncoderSpec, classes: list[str], path: Path) -> None:
    """Write weights to a safetensors file whose metadata states how to build the classifier.

    Args:
        classifier: classifier to save.
        spec: spec of its encoder.
        classes: names of the classes, in the order of the logits.
        path: file to write.

    Raises:
        ValueError: the number of names is not the number of logits.
        UserError: the file cannot be written.
    """
    if len(classes) != classifier.fc.out_features:
        raise ValueError(f"{len(classes)} names for {classifier.fc.out_features} classes")
    metadata = {"timm_name": spec.name, "timm_kwargs": spec.kwargs, "head": classifier.kept, "classes": list(classes)}
    write_weights(classifier, metadata, path)


def load_classifier(path: Path) -> tuple[Classifier, list[str]]:
    """Load a classifier written by `save_classifier`, on the CPU and in evaluation mode, and the names of its classes.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    metadata, state = read_weights(path, "classes")
    with reading_metadata(path):
        classes, kept = json.loads(metadata["classes"]), json.loads(metadata["head"])
        layers = kept.pop("layers") if kept else 0
        head = head_from_spec(kept) if kept else None
        features = kept["features"] if kept else state["fc.weight"].shape[1]
        encoder = create_encoder(spec_from_metadata(metadata))
        classifier = create_classifier(encoder, head, layers, features, len(classes))
    return load_strictly(classifier, state, path), classes
