"""
Single weights to a density
===========================

Gates on single weights (unstructured sparsity). The layers keep their sizes; nine of ten weights
are exactly zero.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import l0fast

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)
steps = 600

model = nn.Sequential(
    nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
)
model = l0fast.sparsify_(model, gates="weight")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
l0fast.DensityConstraint(model, target=0.1, steps=steps).attach(optimizer)

for _ in range(steps):
    batch = torch.randint(1400, (64,))
    loss = F.cross_entropy(model(x[batch]), y[batch])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

small = l0fast.prune(model, x[:8]).eval()
weights = [one.weight for one in small if isinstance(one, nn.Linear)]
open_weights = sum(int((weight != 0).sum()) for weight in weights)
accuracy = (small(x[test]).argmax(1) == y[test]).float().mean()
print(f"accuracy {accuracy:.3f}, weights {sum(w.numel() for w in weights)} -> {open_weights}")
