"""
A plain PyTorch loop
====================

Digits, an MLP, a quarter of its parameters.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import l0fast

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)
steps = 600

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
)
model = l0fast.sparsify_(model, example_inputs=x[:8])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
l0fast.DensityConstraint(
    model, target=0.25, measure="params", example_inputs=x[:8], steps=steps
).attach(optimizer)

for _ in range(steps):
    batch = torch.randint(1400, (64,))
    loss = F.cross_entropy(model(x[batch]), y[batch])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

small = l0fast.prune(model, x[:8])
l0fast.save_pruned(small, "small.safetensors")
accuracy = (small.eval()(x[test]).argmax(1) == y[test]).float().mean()
kept, before = small.report.params
print(f"accuracy {accuracy:.3f}, parameters {before} -> {kept}")
