"""
A loop with Accelerate
======================

With accumulation and a schedule: digits, an MLP, a quarter of its parameters.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import l0fast

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train, test, epochs = slice(0, 1400), slice(1400, None), 30

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU())
net = l0fast.sparsify_(net.append(nn.Linear(100, 10)), example_inputs=x[:8])
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
loader = DataLoader(TensorDataset(x[train], y[train]), 32, shuffle=True)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader) // 2)
model, optimizer, loader, schedule = accelerator.prepare(net, optimizer, loader, schedule)
l0fast.DensityConstraint(
    net, target=0.25, measure="params", example_inputs=x[:8], steps=epochs * len(loader) // 2
).attach(optimizer)
for _ in range(epochs):
    for images, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
small = l0fast.prune(net, x[:8])
l0fast.save_pruned(small, "small.safetensors")
accuracy = (small.eval()(x[test]).argmax(1) == y[test]).float().mean()
print(f"accuracy {accuracy:.3f}, parameters {small.report.params[1]} -> {small.report.params[0]}")
