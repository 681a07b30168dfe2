"""The start of an attached training: all gates open, then each by the magnitude of its unit.

Gates that are drawn from the first step are decided by chance: nothing is known of the units yet.
After a start without noise the weights tell more from less important ones.
"""

from __future__ import annotations

from typing import Any

import torch

from l0fast.constraints.ranking import shared_magnitudes
from l0fast.layers.branch import branch_gates
from l0fast.layers.draw import DRAWN

CENTRE, REACH = 2.0, 2.0
"""log_alpha of the gates when the start is over: its middle, and how far ranks spread it."""


@torch.no_grad()
def spread_(term: Any) -> None:
    """Ends the start: gives each gate its log_alpha by rank, in place, and lets noise in.

    Equals, in each layer:
        log_alpha = CENTRE + REACH * (2 * rank / (N - 1) - 1)
    with the rank, from 0 to N - 1, of the root mean square of the weights behind each gate. The
    targets come down from the density that follows. Gates on branches start at CENTRE.
    """
    handle = term.handle
    for name, sizes in shared_magnitudes(handle.layers).items():
        log_alpha = handle.layers[name].log_alpha
        ranks = torch.empty(sizes.numel(), dtype=torch.float64, device=sizes.device)
        ranks[sizes.flatten().argsort(stable=True)] = torch.linspace(
            -1.0, 1.0, sizes.numel(), dtype=torch.float64, device=sizes.device
        )
        log_alpha.copy_((CENTRE + REACH * ranks).view(log_alpha.shape))
    for gate in branch_gates(handle.layers).values():
        gate.log_alpha.fill_(CENTRE)
    handle.set_stage(DRAWN)
    term.begin_()
