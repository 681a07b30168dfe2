"""
An encoder, fine-tuned to half of its parameters
================================================

A small BERT tells which module of Python's library a line is from, one character a token. It is
trained, and then fine-tuned with gates on its heads and units.
"""

import _pydecimal
import argparse
import inspect
import tarfile
import typing

import torch
from transformers import BertConfig, BertForSequenceClassification, set_seed

import l0fast

set_seed(0)
length, sources = 48, [inspect.getsource(one) for one in (argparse, _pydecimal, tarfile, typing)]
lines = [(k, line.strip()) for k, text in enumerate(sources) for line in text.splitlines()]
lines = [(k, line) for k, line in lines if len(line) > 20]
x = torch.tensor([[min(ord(c), 127) for c in line[:length].ljust(length)] for _, line in lines])
y = torch.tensor([k for k, _ in lines])
order = torch.randperm(len(y))
train, test = order[:-800], order[-800:]

sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
config = BertConfig(vocab_size=128, num_attention_heads=4, num_labels=len(sources), **sizes)
model = BertForSequenceClassification(config)


def fit(model, optimizer, steps):
    for _ in range(steps):
        batch = train[torch.randint(len(train), (32,))]
        model(input_ids=x[batch], labels=y[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model):
    return (model.eval()(input_ids=x[test]).logits.argmax(1) == y[test]).float().mean()


fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), 600)
print(f"dense: accuracy {accuracy(model):.3f}")

example, steps = {"input_ids": x[:8]}, 400
model = l0fast.sparsify_(model.train(), example_inputs=example)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
l0fast.DensityConstraint(
    model, target=0.5, measure="params", example_inputs=example, steps=steps
).attach(optimizer)
fit(model, optimizer, steps)
small = l0fast.prune(model, example)
after, before = small.report.params
print(f"accuracy {accuracy(small):.3f}, parameters {before} -> {after}")
