"""The loss without anything else of this project: 256 pairs of vectors move until the two of each pair are alike.

Usage: python -m examples.loss_alone
"""

import torch
from torch.nn.functional import cosine_similarity

from loss import nt_xent

torch.manual_seed(0)
z = torch.randn(2 * 256, 32, requires_grad=True)  # rows i and 256 + i are the two views of sample i
optimizer = torch.optim.Adam([z], lr=0.05)

for step in range(101):
    loss = nt_xent(z, temperature=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        cosine = cosine_similarity(z[:256], z[256:]).mean()
        print(f"step {step}: loss {loss:.3f}, mean cosine of a pair {cosine:.3f}")
