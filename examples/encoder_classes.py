"""
An encoder, fine-tuned to a third of its work
=============================================

A small BERT tells which of Python's help texts a piece of 32 characters is from. It is trained
first, and then fine-tuned to a third of its multiply-accumulates. Gates start open, so that nothing
of what it has learned is lost when they are put on.
"""

from pydoc_data.topics import topics

import torch
from transformers import BertConfig, BertForSequenceClassification

import l0fast

torch.manual_seed(0)
longest = sorted(topics.values(), key=len)[-4:]
letters = sorted(set("".join(longest)))
pieces, classes = [], []
for number, text in enumerate(longest):
    code = torch.tensor([letters.index(letter) for letter in text])
    pieces.append(code.unfold(0, 32, 16))
    classes.append(torch.full((len(pieces[-1]),), number))
x, y = torch.cat(pieces), torch.cat(classes)
order = torch.randperm(len(x))
train, test = order[200:], order[:200]
steps, batch = 200, 32

sizes = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
config = BertConfig(vocab_size=len(letters), num_attention_heads=4, num_labels=4, **sizes)
model = BertForSequenceClassification(config)


def fit(optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for _ in range(steps):
        rows = train[torch.randint(len(train), (batch,))]
        loss = model(input_ids=x[rows], labels=y[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


fit(torch.optim.AdamW(model.parameters(), lr=1e-3))  # a pretrained model has this behind it

example = {"input_ids": x[:8]}
l0fast.sparsify_(model, example_inputs=example, density_init=1.0)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
l0fast.DensityConstraint(
    model, target=1 / 3, measure="macs", example_inputs=example, steps=steps
).attach(optimizer)
fit(optimizer)

small = l0fast.prune(model, example).eval()
with torch.no_grad():
    accuracy = (small(input_ids=x[test]).logits.argmax(1) == y[test]).float().mean()
after, before = small.report.macs
print(f"accuracy {accuracy:.3f}, MACs {before} -> {after}")
