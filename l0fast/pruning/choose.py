"""Which gates stay: the most that the budgets allow, by rank of their open probability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from l0fast import _checks
from l0fast.layers.gated import Gated
from l0fast.layers.handle import gate_owners, own_gates
from l0fast.measures.amounts import Asked
from l0fast.measures.measure import Measure
from l0fast.pruning.blocks import Blocks


class Budget(NamedTuple):
    """A target that the kept gates must not exceed."""

    name: str
    layers: tuple[str, ...]
    target: float
    measure: Measure
    place: int = 0
    """Of its group among those of the measure."""
    factor: float = 1.0
    """What was found to be spent, over what the measure says."""
    asked: Asked | None = None
    """The target in the caller's words, where it was an amount."""

    def share(self, kept: Mapping[str, Tensor]) -> float:
        """What the kept gates cost, over what all cost."""
        spent = self.measure.spent(kept)[self.place]
        return spent * self.factor / self.measure.totals[self.place]

    def corrected(self, kept: Mapping[str, Tensor], spent: float) -> Budget:
        """The same where the kept gates turned out to cost that much."""
        if not spent:  # as where all gates on single weights are closed
            return self
        reckoned = self.measure.spent(kept)[self.place]
        if not reckoned:  # all of it is gone
            return self
        return self._replace(factor=max(self.factor, spent / reckoned))


def choose(
    layers: Mapping[str, Gated],
    budgets: list[Budget],
    round_to: int = 1,
    fill: bool = False,
    uniform: bool = False,
) -> dict[str, Tensor]:
    """The gates that stay, by layer: bool of log_alpha's shape, on the CPU.

    Gates on units stay and go in blocks of `round_to`, in the order of their open probability
    (the last block of a layer may be smaller); gates on single weights one by one. Every layer
    with gates on units keeps its first block. Then blocks that begin with a gate that is open in
    evaluation are kept in the order of that gate's open probability, as long as every budget
    holds; a layer is complete with its first block that does not fit, and makes room for the
    others'. Where layers share some of their gates, all this is about each part that the same
    layers have, not about a layer. With `fill` those that are closed in evaluation are kept as
    well where there is room, in the layers that a budget is about. With `uniform` layers that
    repeat keep as many gates each, see `Blocks.in_step`.

    Raises:
        ValueError: a budget does not hold the first block of its layers, or a log_alpha is NaN.
    """
    owners = gate_owners(layers)  # shared gates stay and go together
    filled = {owners[name] for one in budgets for name in one.layers} if fill else set[str]()
    blocks = Blocks.of(layers, round_to, filled)
    if uniform:
        blocks = blocks.in_step(layers, round_to)
    sizes = [layers[name].log_alpha.numel() for name in blocks.starts]
    leader, part_of = blocks.leader, blocks.part
    kept = blocks.first.clone()  # of each block, by the gate that it begins with

    def by_layer(opened: Tensor) -> dict[str, Tensor]:
        parts = dict(zip(own_gates(layers), opened[leader].split(sizes), strict=True))
        return {name: parts[of].view(layers[name].log_alpha.shape) for name, of in owners.items()}

    def fits(more: Tensor) -> bool:
        opened = by_layer(kept.index_fill(0, more, True))
        return all(one.share(opened) <= one.target for one in budgets)

    for one in budgets:
        least = one.share(by_layer(kept))
        if least > one.target:
            name = "target" if len(one.layers) == len(layers) else f"target[{one.name!r}]"
            units = "one unit" if round_to == 1 else f"{round_to} units"
            expected = f"a density of at least {least:.6g}, for {units} in each of {one.layers}"
            _checks.refuse(name, one.target if one.asked is None else one.asked, expected)
    waiting = blocks.waits.nonzero().flatten()
    waiting = waiting[blocks.score[waiting].argsort(descending=True, stable=True)]
    while len(waiting):
        # Costs do not fall when a gate opens, so what fits is a beginning of those that wait.
        taken, over = 0, len(waiting) + 1
        while taken + 1 < over:
            middle = (taken + over) // 2
            if fits(waiting[:middle]):
                taken = middle
            else:
                over = middle
        kept[waiting[:taken]] = True
        left = waiting[taken:]
        waiting = left[part_of[left] != part_of[left[:1]]]
    return by_layer(kept)
