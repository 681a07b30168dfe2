"""
A pretrained ResNet to a third of its MACs
==========================================

Fine-tuning: a dense ResNet is trained first, and stands for a pretrained one. Then it gets gates,
and trains on under a target for its multiply-accumulates.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torchvision.models.resnet import BasicBlock, ResNet

import l0fast

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32).expand(-1, 3, -1, -1)
x, y = F.interpolate(images, size=(16, 16)), torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)


def fit(model, steps, constrain=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if constrain is not None:
        constrain(optimizer)
    model.train()
    for _ in range(steps):
        batch = torch.randint(1400, (32,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model):
    return (model.eval()(x[test]).argmax(1) == y[test]).float().mean()


model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
fit(model, 100)
print(f"dense: accuracy {accuracy(model):.3f}")

steps = 200
model = l0fast.sparsify_(model, example_inputs=x[:2])
constraint = l0fast.DensityConstraint(
    model, target=1 / 3, measure="macs", example_inputs=x[:2], steps=steps
)
fit(model, steps, constraint.attach)
small = l0fast.prune(model, x[:2])
after, before = small.report.macs
print(f"accuracy {accuracy(small):.3f}, MACs {before} -> {after}")
