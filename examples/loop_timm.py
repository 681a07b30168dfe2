"""
A loop with timm
================

Its model, optimizer and schedule: digits, a small ViT, a fifth of its parameters.
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader, TensorDataset

import l0fast

digits = load_digits()
x, y = torch.tensor(digits.images[:, None] / 16).float(), torch.tensor(digits.target)
train, test, epochs = slice(0, 1400), slice(1400, None), 40
loader = DataLoader(TensorDataset(x[train], y[train]), 64, shuffle=True)

torch.manual_seed(0)
sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 4}
model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
l0fast.sparsify_(model, example_inputs=x[:8])
optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
schedule, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, warmup_epochs=2)
l0fast.DensityConstraint(
    model, target=0.2, measure="params", example_inputs=x[:8], steps=epochs * len(loader)
).attach(optimizer)
for epoch in range(epochs):
    for images, labels in loader:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    schedule.step(epoch + 1)
small = l0fast.prune(model, x[:8])
l0fast.save_pruned(small, "small.safetensors")
accuracy = (small.eval()(x[test]).argmax(1) == y[test]).float().mean()
print(f"accuracy {accuracy:.3f}, parameters {small.report.params[1]} -> {small.report.params[0]}")
