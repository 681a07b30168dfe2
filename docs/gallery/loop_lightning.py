"""
Lightning's Trainer
===================

Digits, an MLP, a quarter of its parameters.
"""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import l0fast
from l0fast.integrations.lightning import L0Callback

digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


lightning.seed_everything(0)
model, loader = Classifier(), DataLoader(TensorDataset(x[train], y[train]), 64, shuffle=True)
l0fast.sparsify_(model.net, example_inputs=x[:8])
callback = L0Callback(target=0.25, measure="params", example_inputs=x[:8])
lightning.Trainer(max_epochs=30, accelerator="cpu", callbacks=[callback]).fit(model, loader)
small = l0fast.prune(model.net, x[:8])
l0fast.save_pruned(small, "small.safetensors")
accuracy = (small.eval()(x[test]).argmax(1) == y[test]).float().mean()
print(f"accuracy {accuracy:.3f}, parameters {small.report.params[1]} -> {small.report.params[0]}")
