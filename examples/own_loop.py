"""Train with the loader and the loss in a plain PyTorch loop: `python -m examples.own_loop SHARDS/train`."""

import sys

import torch

from loss import nt_xent
from model import EncoderConfig, HeadConfig, create_encoder, encoder_spec, projection_head
from pipeline.augment.config import AugmentConfig
from pipeline.loader import LoaderConfig, ViewLoader
from pipeline.shards import open_shards

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
shards, views = open_shards(sys.argv[1]), AugmentConfig(size=32, crop_area=(0.2, 1.0), jitter_strength=0.5, blur_p=0)
loader = ViewLoader(shards, views, LoaderConfig(), batch_size=64, seed=0, device=device, epochs=10)
encoder = create_encoder(encoder_spec(EncoderConfig("resnet18", stem="standard", width=0.25), image_size=32))
model = torch.nn.Sequential(encoder, projection_head(HeadConfig(), features=128)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(1, 11):
    for batch in loader:  # rows i and 64 + i of batch.views, (128, 3, 32, 32), are the two views of image i
        loss = nt_xent(model(batch.views), temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss:.3f}")
