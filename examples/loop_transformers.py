"""
Hugging Face's Trainer
======================

Digits, a small ViT, a fifth of its parameters.
"""

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import l0fast
from l0fast.integrations.transformers import L0Callback

digits = load_digits()
x, y = torch.tensor(digits.images[:, None] / 16).float(), torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)
rows = [{"pixel_values": x[i], "labels": y[i]} for i in range(1400)]
example = {"pixel_values": x[:8]}

set_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
config = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, num_attention_heads=4, num_labels=10, **sizes
)
model = l0fast.sparsify_(ViTForImageClassification(config), example_inputs=example)
arguments = TrainingArguments(
    "runs/trainer",
    num_train_epochs=30,
    per_device_train_batch_size=64,
    learning_rate=2e-3,
    report_to=[],
    use_cpu=True,
)
callback = L0Callback(target=0.2, measure="params", example_inputs=example)
Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
small = l0fast.prune(model, example)
l0fast.save_pruned(small, "small.safetensors")
accuracy = (small.eval()(pixel_values=x[test]).logits.argmax(1) == y[test]).float().mean()
print(f"accuracy {accuracy:.3f}, parameters {small.report.params[1]} -> {small.report.params[0]}")
