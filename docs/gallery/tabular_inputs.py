"""
Which features does a model need?
=================================

An MLP on a table of 30 features. The gates of the first layer are on the features themselves: those
whose gates close are not read any more.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import nn

import l0fast

torch.manual_seed(0)
table = load_breast_cancer()
x, y = torch.tensor(table.data).float(), torch.tensor(table.target)
order = torch.randperm(len(x))
train, test = order[:400], order[400:]
x = (x - x[train].mean(0)) / x[train].std(0)
steps = 600

model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))
model = l0fast.sparsify_(model, example_inputs=x[:8])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
targets = {"0": 1 / 3, "2": 0.25}  # ten features, a quarter of the hidden units
l0fast.DensityConstraint(model, targets, steps=steps).attach(optimizer)

for _ in range(steps):
    batch = train[torch.randint(len(train), (64,))]
    loss = F.cross_entropy(model(x[batch]), y[batch])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

small = l0fast.prune(model, x[:8]).eval()
first = next(one for one in small.report.layers if one["name"] == "0")
kept, _ = first["gather"]
print("features:", ", ".join(table.feature_names[place] for place in kept))
accuracy = (small(x[test]).argmax(1) == y[test]).float().mean()
print(f"accuracy {accuracy:.3f}, features 30 -> {len(kept)}")
