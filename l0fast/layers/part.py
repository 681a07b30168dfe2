"""Gates on whole parts of a model, that are no units of a layer: branches, experts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from l0fast import functional
from l0fast.layers.draw import Drawn
from l0fast.maths.hard_concrete import HardConcrete


class PartGate(Drawn, nn.Module):
    """Hard-concrete gates on parts of a model. They are drawn with all other gates of the model.

    It is a child of one of the model's modules, whose hooks ask it for its gates.

    Args:
        number: how many gates.
        like: a tensor of the parts' dtype and device.
        group_size: how many parameters each part has.
        density_init, distribution: as in `Gated`.
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Identity
    told_apart: ClassVar[bool] = False
    noise = "batch"
    units = 1

    def __init__(
        self,
        number: int,
        like: Tensor,
        group_size: int,
        density_init: float,
        distribution: HardConcrete | None = None,
    ) -> None:
        super().__init__()
        self.group_size, self.all_gates = group_size, number
        self.distribution = functional.checked_distribution(distribution)
        dtype = torch.promote_types(like.dtype, torch.float32)
        start = self.distribution.log_alpha(density_init)
        self.log_alpha = nn.Parameter(torch.full((number,), start, dtype=dtype, device=like.device))

    def dense(self) -> nn.Module:
        """What stands in its place in a model without gates."""
        return nn.Identity()

    def remember_size(self) -> None:
        """Its size does not change."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The state of a model without these gates loads too: they stay as they are.
        own = {
            prefix + "log_alpha": self.log_alpha.detach(),
            prefix + "_extra_state": self.get_extra_state(),
        }
        lacking = {key: value for key, value in own.items() if key not in state_dict}
        state_dict.update(lacking)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for key in lacking:
            del state_dict[key]
