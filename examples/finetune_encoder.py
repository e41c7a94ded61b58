"""Fine-tune an exported encoder in plain PyTorch: `python -m examples.finetune_encoder ENCODER PHOTOS`."""

import sys

import timm
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import model  # noqa: F401  lets timm build simclr_resnet*

torch.manual_seed(0)
train, test = (ImageFolder(f"{sys.argv[2]}/{split}") for split in ("train", "test"))  # one folder per class in each
classifier = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True, num_classes=len(train.classes))
train.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(classifier), is_training=True)
test.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(classifier))
optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
for _ in range(10):
    for x, y in DataLoader(train, batch_size=32, shuffle=True):  # (B, 3, S, S), (B,)
        loss = torch.nn.functional.cross_entropy(classifier(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
classifier.eval()
print("test accuracy:", sum((classifier(x).argmax(1) == y).sum().item() for x, y in DataLoader(test, 32)) / len(test))
