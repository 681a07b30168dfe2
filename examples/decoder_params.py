"""
A small language model to a parameter budget
============================================

A LLaMA of two layers reads Python's own help texts, one character a token. The target is an amount:
150,000 parameters.
"""

from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import l0fast

torch.manual_seed(0)
text = "\n".join(topics.values())
letters = sorted(set(text))
code = torch.tensor([letters.index(letter) for letter in text])
steps, length = 300, 64

config = LlamaConfig(
    vocab_size=len(letters),
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
)
model = LlamaForCausalLM(config)
example = {"input_ids": code[None, :length]}
model = l0fast.sparsify_(model, example_inputs=example)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
l0fast.DensityConstraint(
    model, target="150k params", measure="params", example_inputs=example, steps=steps
).attach(optimizer)

for _ in range(steps):
    starts = torch.randint(len(code) - length, (16,))
    batch = code[starts[:, None] + torch.arange(length)]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

small = l0fast.prune(model, example).eval()
prompt = torch.tensor([[letters.index(letter) for letter in "The statement "]])
written = small.generate(prompt, max_new_tokens=60, do_sample=False)[0]
print("".join(letters[one] for one in written))
after, before = small.report.params
print(f"loss {loss:.3f}, parameters {before} -> {after}")
