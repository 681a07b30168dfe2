"""A pruned model of Hugging Face as a folder that plain `from_pretrained` loads.

A configuration has one number for each width. So all layers must have the same widths (see
`prune(uniform=True)`). Else the folder has a file of l0fast, and a README that says so.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from l0fast import _checks
from l0fast._files import write_text
from l0fast.graph.calls import Example, evaluating, own_randomness
from l0fast.graph.compare import TOLERANCE, relative_error, values_of
from l0fast.graph.cuts import Cut, before_cuts
from l0fast.layers.rms_norm import form_of
from l0fast.pruning.report import required_report
from l0fast.pruning.saving import load_pruned, save_pruned

WIDTHS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("d_model", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "num_hidden_layers"),
    *("moe_intermediate_size", "ffn_hidden_size", "shared_expert_intermediate_size"),
)
"""Attributes of configurations that are sizes."""
EPS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")
"""Attributes that are the eps of norms."""
MOST_TRIES = 256
OWN, CONFIG, README = "pruned.safetensors", "dense", "README.md"
"""The names in a folder that l0fast loads: its file, the folder of the dense model's configuration,
and a note."""
NOTE = """# A pruned {kind}

Its layers have different widths, and a configuration has one number for all layers. So
`from_pretrained` does not load this folder.

```python
from l0fast.integrations.transformers import load_pretrained
model = load_pretrained("{folder}")
```

`prune(model, x, uniform=True)` keeps widths that a configuration can hold. The reason why this one
cannot: {why}.
"""


class _NotPlain(Exception):
    """The reason why no configuration describes a pruned model."""


def save_pretrained(
    small: nn.Module, folder: str | os.PathLike[str], example_inputs: Any = None
) -> str:
    """Writes a pruned model of Hugging Face to a folder.

    If a configuration can hold all widths, the folder is an ordinary one: the class's own
    `from_pretrained` loads it, without l0fast. The configuration gets the new widths. Values that
    follow from them (eps of norms, the scale of embeddings) are corrected in the weights. The model
    that the folder gives is compared with `small` first. Else `load_pretrained` loads the folder,
    and a README in it says so.

    Args:
        small: a pruned `PreTrainedModel`, as `prune` returned it or trained further.
        folder: made if it does not exist.
        example_inputs: what the model's forward takes. By default tokens, if it takes `input_ids`.

    Returns:
        "" if plain `from_pretrained` loads the folder, else the reason why it does not.

    Raises:
        ValueError: the model is not pruned, or `example_inputs` is needed and not given.
        TypeError: the model is not a `PreTrainedModel`.
    """
    if not isinstance(small, transformers.PreTrainedModel):
        expected = "a pruned PreTrainedModel"
        _checks.refuse("small", type(small).__name__, expected, TypeError)
    required_report(small)
    example = _example(small, example_inputs)
    folder = Path(folder)
    try:
        plain = _plain(small, example)
    except _NotPlain as reason:
        why = str(reason)
    else:
        plain.save_pretrained(folder)
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    save_pruned(small, folder / OWN)
    cuts = [Cut.from_json(entry) for entry in required_report(small).cuts]
    before_cuts(small, cuts).save_pretrained(folder / CONFIG)
    facts = {"class": type(small).__name__}
    write_text(folder / CONFIG / "l0fast.json", json.dumps(facts))
    write_text(folder / README, NOTE.format(kind=type(small).__name__, folder=folder.name, why=why))
    return why


def load_pretrained(folder: str | os.PathLike[str]) -> Any:
    """Loads the model of a folder that `save_pretrained` wrote, in evaluation mode.

    Raises:
        ValueError: there is no such folder, or `save_pretrained` did not write it.
    """
    folder = Path(folder)
    own, config = folder / OWN, folder / CONFIG
    if not own.is_file():
        if not (folder / "config.json").is_file():
            _checks.refuse("folder", str(folder), "one that save_pretrained wrote")
        saved: Any = transformers.AutoConfig.from_pretrained(folder)
        return _class(saved.architectures[0]).from_pretrained(folder)
    kind = _class(json.loads((config / "l0fast.json").read_text(encoding="utf-8"))["class"])
    return load_pruned(lambda: kind(kind.config_class.from_pretrained(config)), own).eval()


def _class(name: str) -> Any:
    return getattr(transformers, name)


def _example(small: Any, example_inputs: Any) -> Example:
    if example_inputs is not None:
        return Example.of(example_inputs, small)
    if small.main_input_name != "input_ids":
        expected = f"what the model's forward takes ({small.main_input_name})"
        _checks.refuse("example_inputs", None, expected)
    tokens = torch.arange(2, 18, device=small.device).view(2, 8) % small.config.vocab_size
    return Example(kwargs={"input_ids": tokens})


# --- the configuration ----------------------------------------------------------------------------


def _plain(small: Any, example: Example) -> Any:
    """A model of a corrected configuration that computes the same as a pruned one.

    Raises:
        _NotPlain: there is none.
    """
    plain = _of_size(small)
    plain.load_state_dict(small.state_dict())
    plain.to(small.device).train(small.training)
    if small.can_generate():
        plain.generation_config = copy.deepcopy(small.generation_config)
    _make_up_for_eps(small, plain)
    _make_up_for_scales(small, plain)
    error, allowed = _error(small, plain, example), TOLERANCE.get(small.dtype, 5e-2)
    if error > max(allowed, TOLERANCE[torch.float32]):
        raise _NotPlain(f"with the widths alone in its configuration it differs by {error:.3g}")
    return plain


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _of_size(small: Any) -> Any:
    """A new model of the class of a pruned one whose tensors have the same names and sizes."""
    wanted, kind = _shapes(small), type(small)
    with torch.device("meta"):
        before = _shapes(kind(copy.deepcopy(small.config)))
    if before.keys() != wanted.keys():
        names = sorted(before.keys() ^ wanted.keys())
        raise _NotPlain(f"it has other parts than a {kind.__name__}, such as {names[0]!r}")
    for config in islice(_configs(small, before, wanted), MOST_TRIES):
        try:
            with torch.device("meta"):
                fits = _shapes(kind(copy.deepcopy(config))) == wanted
        except Exception:  # numbers that contradict each other
            continue
        if fits:
            _check(config)
            with own_randomness(small):
                return kind(config).to(small.dtype)
    changed = [name for name in wanted if wanted[name] != before[name]]
    raise _NotPlain(f"no configuration has the sizes of {changed[0]!r} and the others")


def _check(config: Any) -> None:
    """What transformers asks of a configuration before it is saved, such as a hidden size that is
    a multiple of the number of heads."""
    validate = getattr(config, "validate", None)
    try:
        if validate is not None:
            validate()
    except Exception as refusal:
        cause = _checks.one_line(Exception(str(refusal.__cause__ or refusal)))
        reason = f"{type(config).__name__} refuses its sizes ({cause}); round_to may help"
        raise _NotPlain(reason) from refusal


def _configs(small: Any, before: Any, wanted: Any) -> Iterator[Any]:
    """Configurations that may give a model the sizes that it has: each number of the old one that
    says a size may have become what that size has."""
    config = copy.deepcopy(small.config)
    became: dict[int, set[int]] = {}
    for name, shape in before.items():
        for old, new in zip(shape, wanted[name], strict=True):
            became.setdefault(old, set()).add(new)
    heads = getattr(config, "num_attention_heads", None)
    if heads and getattr(config, "head_dim", None) is None:
        # Or else it would be computed from the new sizes.
        config.head_dim = config.hidden_size // heads
    each: list[list[tuple[str, int]]] = []
    for key in (key for key in WIDTHS if isinstance(getattr(config, key, None), int)):
        value = getattr(config, key)
        width = config.head_dim if "heads" in key and heads else 1
        found = {new // width for new in became.get(value * width, set()) if not new % width}
        if key == "num_key_value_heads":  # where queries, keys and values are one layer
            fewer = (new for some in each for name, new in some if name == "num_attention_heads")
            found |= {value * new // heads for new in fewer if not value * new % heads}
        each.append([(key, number) for number in sorted({value, *found})])
    _follow_eps(small, config)
    for chosen in product(*each):
        one = copy.deepcopy(config)
        for key, number in chosen:
            setattr(one, key, number)
        yield one


def _follow_eps(small: Any, config: Any) -> None:
    """Puts the eps of smaller norms into the configuration; eps changes with their channels."""
    new: set[float] = set()
    for entry in required_report(small).layers:
        norm = small.get_submodule(entry["name"])
        form = form_of(norm)
        if form is not None and entry["out"][0] < entry["out"][1]:
            new.add(getattr(norm, form.eps))
    if len(new) > 1:
        raise _NotPlain("its norms have different eps")
    for key in EPS if new else ():
        if hasattr(config, key):
            setattr(config, key, new.pop())
            return
    if new:
        raise _NotPlain("its configuration has no eps of norms")


# --- what follows from it -------------------------------------------------------------------------


@torch.no_grad()
def _make_up_for_eps(small: Any, plain: Any) -> None:
    """Corrects norms whose eps has changed, by scaling their inputs.

    Equals, for a norm of heads behind a projection:
        projection.weight *= sqrt(eps now / eps before)
    """
    for name, norm in plain.named_modules():
        form = form_of(norm)
        if form is None:
            continue
        now, before = (getattr(one, form.eps) for one in (norm, small.get_submodule(name)))
        if now == before:
            continue
        source = name.removesuffix("_norm") + "_proj"
        layer = dict(plain.named_modules()).get(source)
        if not name.endswith("_norm") or not isinstance(layer, nn.Linear):
            raise _NotPlain(f"{name!r} has another eps than the other norms")
        for parameter in layer.parameters():
            parameter.mul_((now / before) ** 0.5)


@torch.no_grad()
def _make_up_for_scales(small: Any, plain: Any) -> None:
    """Scales embeddings that the model multiplies by the root of the hidden size, as Gemma does.

    The new weight makes up for the new root. If the head shares this weight, the last norm in front
    of it is scaled the other way.
    """
    for name, layer in plain.named_modules():
        scale, before = (
            getattr(one, "embed_scale", None) for one in (layer, small.get_submodule(name))
        )
        if not isinstance(layer, nn.Embedding) or not isinstance(scale, Tensor):
            continue
        factor = float(before) / float(scale)  # type: ignore[arg-type]
        layer.weight.mul_(factor)
        head = plain.get_output_embeddings()
        if factor != 1 and head is not None and head.weight is layer.weight:
            norm = plain.get_submodule(f"{name.rpartition('.')[0]}.norm")
            form = form_of(norm)
            if form is None:
                raise _NotPlain(f"no norm is in front of the head that shares {name!r}")
            norm.weight.copy_((norm.weight + form.offset) / factor - form.offset)


def _error(small: Any, plain: Any, example: Example) -> float:
    given: list[list[Tensor]] = []
    for model in (small, plain):
        with evaluating(model), own_randomness(model, 0):
            given.append([one.clone() for one in values_of(example.copy().call(model))])
    return relative_error(given[1], given[0])
