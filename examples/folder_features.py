"""Features of a folder of images from an encoder exported by `python export.py RUN ENCODER --format huggingface`.

Usage: python -m examples.folder_features ENCODER IMAGES features.npz
"""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import model  # noqa: F401  lets timm build simclr_resnet*

encoder = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))  # center crop, normalized
files = sorted(path for path in Path(sys.argv[2]).rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
features = np.empty((len(files), encoder.num_features), np.float32)
with torch.inference_mode():
    for i, file in enumerate(files):
        features[i] = encoder(transform(Image.open(file).convert("RGB"))[None])  # (1, 3, S, S) -> (1, D)
np.savez(sys.argv[3], path=[str(file) for file in files], features=features)
print(f"{len(features)} images, {features.shape[1]} features each: {sys.argv[3]}")
