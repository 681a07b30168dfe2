"""
A vision transformer to a latency
=================================

The target is half of the seconds that the dense model takes for a batch of 64 on this machine.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torchvision.models import VisionTransformer

import l0fast

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32).expand(-1, 3, -1, -1)
x, y = images.contiguous(), torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)
steps = 400

sizes = {"hidden_dim": 64, "mlp_dim": 512, "num_layers": 2, "num_heads": 4}
model = VisionTransformer(image_size=8, patch_size=2, num_classes=10, **sizes)
model = l0fast.sparsify_(model, example_inputs=x[:64])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
l0fast.DensityConstraint(
    model, target=0.5, measure="latency", example_inputs=x[:64], steps=steps
).attach(optimizer)

for _ in range(steps):
    batch = torch.randint(1400, (64,))
    loss = F.cross_entropy(model(x[batch]), y[batch])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

small = l0fast.prune(model, x[:64])
print(small.report)
with torch.no_grad():
    accuracy = (small.eval()(x[test]).argmax(1) == y[test]).float().mean()
(group,) = small.report.groups.values()
before, after = 1e3 * group["total"], 1e3 * group["kept"]
print(f"accuracy {accuracy:.3f}, predicted ms {before:.2f} -> {after:.2f}")
