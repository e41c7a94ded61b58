"""Classifiers for fine-tuning and distillation: an encoder, the layers of its projection head that are kept, one more.

SimCLR v1 fine-tunes from h; v2 from the first layer of its deeper head, which thereby becomes part of the encoder
(arXiv 2006.10029, section 2, "Fine-tuning": f_task(x) = W_task relu(W1 f(x))).
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
    spec_in,
)
from .head import head_from_spec, head_spec, load_head
from .weights import load_strictly, read_weights, reading_metadata, write_weights


@dataclass(frozen=True)
class StartConfig:
    """Initial weights of a classifier."""

    run: str = ""
    """Run folder of a finished pretraining; empty for random weights."""
    from_layer: int = 0
    """Layers of its projection head to keep below the new one: 0 starts from h; SimCLR v2 keeps 1."""

    def __post_init__(self) -> None:
        check_range("--start.from-layer", self.from_layer, 0, 10**9)


class Classifier(nn.Module):
    """Images to class scores. Made by `fine_tuned` and `load_classifier`.

    Attributes:
        encoder: (N, 3, H, W) -> h (N, features).
        head: the layers of a projection head that are kept, none for fine-tuning from h.
        fc: the new linear layer.
        kept: `head_spec` of the whole head with "layers", how many of them are kept; None for none.
    """

    def __init__(self, encoder: nn.Module, head: nn.Sequential, fc: nn.Linear, kept: dict | None):
        super().__init__()
        self.encoder, self.head, self.fc, self.kept = encoder, head, fc, kept

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, classes)."""
        h = self.encoder(images)  # (N, features)
        x = self.head(h)  # (N, width of the last layer kept)
        # bf16 keeps 8 bits of a logit: classes would tie, and a temperature of 0.1 magnifies the rounding tenfold
        with torch.autocast(x.device.type, enabled=False):
            return self.fc(x.to(self.fc.weight.dtype))


def fine_tuned(
    encoder: nn.Module, head: nn.Sequential | None, from_layer: int, features: int, classes: int
) -> Classifier:
    """A classifier to be fine-tuned, in training mode, on the encoder's own modules and not on copies.

    Args:
        encoder: (N, 3, H, W) -> h (N, features), pretrained or not.
        head: the projection head it was trained with; None if nothing of it is to be kept.
        from_layer: how many layers of the head are kept, each with its batch norm and ReLU: 0 for fine-tuning from
            h, 1 for v2's choice.
        features: width of h.
        classes: how many there are to tell apart.

    Returns:
        `Classifier` whose last layer begins at zero, as in the official code's commands for fine-tuning
        (`zero_init_logits_layer`): all classes alike, whatever the scale of what comes before.

    Raises:
        UserError: the head has fewer layers or another input width, or there is none.
    """
    layers = 0 if head is None else sum(isinstance(module, nn.Linear) for module in head)
    if not 0 <= from_layer <= layers:
        has = f"has {layers} layers" if layers else "is not there"
        raise UserError(
            f"Can't fine-tune from layer {from_layer} of a head that {has}: use --start.from-layer 0 to {layers}."
        )
    kept, width, spec = nn.Sequential(), features, None
    if from_layer:
        if head_spec(head)["features"] != features:
            raise UserError(
                f"The projection head takes {head_spec(head)['features']} features, the encoder has {features}: use "
                "both from one run."
            )
        for name, module in head.named_children():
            if int(name[-1]) <= from_layer:
                kept.add_module(name, module)
                width = module.out_features if isinstance(module, nn.Linear) else width
        spec = {**head_spec(head), "layers": from_layer}
    fc = nn.Linear(width, classes)
    nn.init.zeros_(fc.weight)
    nn.init.zeros_(fc.bias)
    return Classifier(encoder, kept, fc, spec).train()


def start_classifier(
    start: StartConfig, encoder: EncoderConfig, image_size: int, classes: int
) -> tuple[Classifier, EncoderSpec]:
    """A classifier with the initial weights that the configuration names, in training mode.

    Args:
        start: run to start from, or random weights.
        encoder: architecture for random weights.
        image_size: side of a view in pixels.
        classes: number of classes.

    Raises:
        UserError: the run is not finished, or its encoder cannot take such views.
    """
    if not start.run:
        spec = encoder_spec(encoder, image_size)
        network, head = create_encoder(spec), None
    else:
        file = Path(start.run) / "encoder.safetensors"
        spec, network = read_spec(file), load_encoder(file)
        head = load_head(Path(start.run) / "head.safetensors") if start.from_layer else None
    return fine_tuned(network, head, start.from_layer, feature_dim(network, image_size), classes), spec


def save_classifier(classifier: Classifier, spec: EncoderSpec, classes: list[str], path: Path) -> None:
    """Weights in safetensors, with all that it takes to build the classifier in the file's metadata.

    Args:
        classifier: what `fine_tuned` made.
        spec: of its encoder.
        classes: their names, in the order of the logits.
    """
    if len(classes) != classifier.fc.out_features:
        raise ValueError(f"{len(classes)} names for {classifier.fc.out_features} classes")
    metadata = {"timm_name": spec[0], "timm_kwargs": spec[1], "head": classifier.kept, "classes": list(classes)}
    write_weights(classifier, metadata, path)


def load_classifier(path: Path) -> tuple[Classifier, list[str]]:
    """The classifier that `save_classifier` wrote, on the CPU and in evaluation mode, and the names of its classes.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    metadata, state = read_weights(path, "classes")
    with reading_metadata(path):
        classes, kept = json.loads(metadata["classes"]), json.loads(metadata["head"])
        layers = kept.pop("layers") if kept else 0
        head = head_from_spec(kept) if kept else None
        features = kept["features"] if kept else state["fc.weight"].shape[1]
        classifier = fine_tuned(create_encoder(spec_in(metadata)), head, layers, features, len(classes))
    return load_strictly(classifier, state, path), classes
