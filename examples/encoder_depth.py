"""
An encoder to half of its parameters: depth, heads and FFN
==========================================================

A small BERT learns which library a piece of documentation is of. Then it is fine-tuned under the
constraint, with gates on heads, on units of the MLPs, and on whole attentions and MLPs.
"""

import inspect
import zlib

import numpy
import scipy.stats
import torch
from transformers import BertConfig, BertForSequenceClassification

import l0fast

torch.manual_seed(0)
words, labels = [], []
for label, module in enumerate((numpy, torch, scipy.stats)):
    docs = (inspect.getdoc(getattr(module, name)) or "" for name in vars(module))
    text = [1 + zlib.crc32(word.encode()) % 999 for doc in docs for word in doc.split()]
    pieces = torch.tensor(text[: len(text) // 32 * 32]).view(-1, 32)[:1500]
    words.append(pieces)
    labels.append(torch.full((len(pieces),), label))
x, y = torch.cat(words), torch.cat(labels)
order = torch.randperm(len(x))
test, train = order[:500], order[500:]

config = BertConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=4, max_position_embeddings=32, num_labels=3,
)  # fmt: skip
model = BertForSequenceClassification(config)


def fit(optimizer, steps):
    for _ in range(steps):
        batch = train[torch.randint(len(train), (32,))]
        model(input_ids=x[batch], labels=y[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


fit(torch.optim.AdamW(model.parameters(), lr=1e-3), steps=150)
example = {"input_ids": x[:32]}
model = l0fast.sparsify_(model, example_inputs=example, density_init=1.0, depth=True)
optimizer = torch.optim.AdamW(l0fast.param_groups(model, lr=5e-4, steps=300))
l0fast.DensityConstraint(
    model, target=0.5, measure="params", example_inputs=example, steps=300
).attach(optimizer)
fit(optimizer, steps=300)

small = l0fast.prune(model, example).eval()
with torch.no_grad():
    accuracy = (small(input_ids=x[test]).logits.argmax(1) == y[test]).float().mean()
after, before = small.report.params
print(f"accuracy {accuracy:.3f}, params {before} -> {after}")
