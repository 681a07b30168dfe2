"""
A decoder under the Trainer, back into a folder
===============================================

A LLaMA reads Python's own help texts, one character a token. The Trainer brings it to 75,000
parameters along all axes: depth, hidden width, heads and units. What comes out is a folder that
`from_pretrained` loads without l0fast.
"""

from pydoc_data.topics import topics

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import l0fast
from l0fast.integrations.transformers import L0Callback, save_pretrained

set_seed(0)
text = "\n".join(topics.values())
letters = sorted(set(text))
code = torch.tensor([letters.index(letter) for letter in text])
length = 32
rows = [{"input_ids": piece, "labels": piece} for piece in code.split(length)[:3200]]
example = {"input_ids": code[None, :length]}

sizes = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), **sizes, **heads))
model = l0fast.sparsify_(model, example_inputs=example, hidden=True, uniform=True)
arguments = TrainingArguments(
    "runs/decoder",
    num_train_epochs=1,
    per_device_train_batch_size=16,
    learning_rate=2e-3,
    report_to=[],
    use_cpu=True,
)
callback = L0Callback(target="75k params", measure="params", example_inputs=example)
collator = default_data_collator
trainer = Trainer(model, arguments, collator, train_dataset=rows, callbacks=[callback])
trainer.train()

small = l0fast.prune(model, example, round_to=4).eval()
print(save_pretrained(small, "runs/small") or "from_pretrained loads it")
plain = LlamaForCausalLM.from_pretrained("runs/small").eval()
test = torch.stack(code.split(length)[4000:4200])
with torch.no_grad():
    loss = plain(input_ids=test, labels=test).loss
after, before = small.report.params
print(f"loss {loss:.3f}, parameters {before} -> {after}")
