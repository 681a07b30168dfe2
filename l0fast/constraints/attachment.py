"""Attaching a constraint to an optimizer: what the method adds happens inside `optimizer.step()`.

An attached training, from its first step to its last:

1. The start: all gates are open, without noise; the weights learn which units matter.
2. Each `log_alpha` is set by the rank of its unit's magnitude (see `start`). From here on gates are
   drawn quietly, and the targets come down.
3. After each step of the optimizer: the gradient of the constraint's term is added to that of the
   gates, an Adam of their own moves them, and the multipliers move.
4. For the last part the gates are settled (see `settle`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from l0fast import _checks, _warnings
from l0fast.constraints.at_once import moved_at_once
from l0fast.constraints.gate_adam import GateAdam
from l0fast.constraints.hidden import HiddenGradients
from l0fast.constraints.processes import averaged, mark_partial, own_part
from l0fast.constraints.start import Starting
from l0fast.constraints.watch import Idle
from l0fast.gating.param_groups import default_gate_lr
from l0fast.layers.stages import DRAWN

STATE = "l0fast"
"""Key of the attachment's state in the optimizer's state."""
FEW_STEPS = 200
"""With fewer steps than this the pruned model ends well below the dense one. At 25 % of the
parameters of an MLP 300-100, test accuracy on digits, dense / pruned (Adam, 1e-3, batch 64, means
of 3 seeds): 100 steps .888 / .854, 150 steps .902 / .877, 200 steps .906 / .891, 300 steps .918 /
.898, 600 steps .928 / .906."""


def _has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has a state of steps before; Adagrad has one before its first."""
    return any(float(one.get("step", 1)) > 0 for one in optimizer.state.values() if one)


def _is_initial(optimizer: torch.optim.Optimizer, kwargs: Any) -> bool:
    """Whether a step is the one by which `torch.distributed.checkpoint` makes an optimizer's state:
    without learning rates or gradients."""
    named = "closure" in kwargs and kwargs["closure"] is None
    return named and not optimizer.state and not any(g.get("lr") for g in optimizer.param_groups)


class Attachment:
    """A constraint inside the steps of an optimizer.

    Attributes:
        taken: how many steps of the optimizer there have been.
        steps: of the whole training.
        last: the step before which the gates settle, or None.
    """

    def __init__(
        self,
        term: Any,
        optimizers: Sequence[torch.optim.Optimizer],
        steps: int,
        settle: float,
        gate_lr: float | None,
    ) -> None:
        self.term, self.steps, self.taken = term, steps, 0
        self.last = steps - math.ceil(settle * steps) if settle and term.learns else None
        self.gate_lr = default_gate_lr(steps) if gate_lr is None else gate_lr
        self._optimizers = list(optimizers)
        self._hidden = HiddenGradients(self.gates)
        self._loaded: Any = None
        self._without_ours = self._initial = self._just_loaded = False
        self._versions: list[int] = []
        self._touched = 0
        self._warned: set[str] = set()
        self._idle = Idle()
        self._resumed = _has_stepped(optimizers[0])
        self._joined: list[Tensor] = []
        if term.learns and steps < FEW_STEPS:  # before anything is changed: it may be an error
            self._warn(
                f"{steps} steps are few for gates to learn in: the pruned model will be much worse "
                f"than the dense one. Train for {FEW_STEPS} or more, or use magnitude pruning"
            )
        gates = self.gates()
        self._adam = GateAdam(gates, self.gate_lr)
        for optimizer in self._optimizers:
            self._join(optimizer, gates)
        self._removers = [remove for one in self._optimizers for remove in self._hook(one)]
        self._removers += mark_partial(gates, term.handle.layers)

    def gates(self) -> list[Tensor]:
        """The log_alpha of every gated layer, each once; asked anew, as they may be replaced."""
        return self.term.handle.parameters()

    # --- the optimizer -------------------------------------------------------------------------

    def _join(self, optimizer: torch.optim.Optimizer, gates: list[Tensor]) -> None:
        """Puts the gates into the counting optimizer's last group where it lacks them: then
        zero_grad, unscaling and clipping reach their gradients. It never steps them."""
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        if optimizer is self._optimizers[0]:
            self._joined = [gate for gate in gates if id(gate) not in held]
            optimizer.param_groups[-1]["params"].extend(self._joined)

    def _hook(self, optimizer: torch.optim.Optimizer) -> list[Callable[[], None]]:
        counting = optimizer is self._optimizers[0]
        after = self._after if counting else self._hidden.give_back
        handles = [
            optimizer.register_step_pre_hook(self._before if counting else self._hidden.before),
            optimizer.register_step_post_hook(after),
        ]
        if counting:
            handles.append(optimizer.register_state_dict_post_hook(self._save))
            handles.append(optimizer.register_load_state_dict_pre_hook(self._check))
            handles.append(optimizer.register_load_state_dict_post_hook(self._load))
        return [handle.remove for handle in handles]

    def remove(self) -> None:
        """Takes the hooks off the optimizers, and the gates that were put into one out of it."""
        for remove in self._removers:
            remove()
        for gate in self.gates():
            self._optimizers[0].state.pop(gate, None)
        group = self._optimizers[0].param_groups[-1]
        joined = set(map(id, self._joined))
        group["params"][:] = [one for one in group["params"] if id(one) not in joined]
        if self.term.starting:
            self.term.handle.set_stage(DRAWN)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Pre-hook of the step that counts."""
        self._initial = _is_initial(optimizer, kwargs)
        if not self._initial:
            self._look()
            self._just_loaded = False
        return self._hidden.before(optimizer, args, kwargs)

    # --- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Post-hook of the step: the gates' and the multipliers' part of it."""
        grads = self._hidden.take()
        if grads is None:
            return
        if self._initial:
            self._adam.show_in(optimizer, self.gates())
            return
        # A fused optimizer is left the unscaling, and the decision to skip, by a GradScaler.
        skipped: Any = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):
            return
        captured = self.term.refuse_capture("optimizer.step()")
        if not captured and (words := self._idle.look(self.term)) is not None:
            self._warn(words)
        if not self.term.starting:
            if self.term.learns:
                self._move(grads, getattr(optimizer, "grad_scale", None))
            self.term.advance_()
        if not captured:  # else nothing is done yet
            self.count_()
        gates = self.gates()
        self._adam.show_in(optimizer, gates)
        self._versions = [gate._version for gate in gates]

    def count_(self) -> bool:
        """Counts a step of the optimizer, on the host, and settles the gates when it is time; true
        if gates are another thing from here on.

        A captured step does not have it: call the constraint's `count_` after each replay.
        """
        self.taken += 1
        changed = Starting.count_(self.term)
        if self.taken == self.last and not self.term.settled:
            self.term.settle(self._adam.adam)
            changed = True
        return changed

    def _move(self, grads: Sequence[Tensor | None], scale: Tensor | None) -> None:
        """One step of Adam on the gates, by the loss's gradient and the constraint's."""
        gates = self.gates()
        if moved_at_once(self.term, self._adam, gates, grads, scale):
            return
        trained = [gate for gate in gates if gate.requires_grad]
        pulls: dict[int, Tensor | None] = {}
        if not self.term.settled and trained:
            self.term.handle.forget_counts()  # their graph is spent
            with torch.enable_grad():
                value = self.term.value()
            found = torch.autograd.grad(value, trained, allow_unused=True)
            own = [None if one is None else own_part(one) for one in found]
            pulls = dict(zip(map(id, trained), own, strict=True))
        total: list[Tensor | None] = []
        for gate, grad in zip(gates, averaged(grads, gates, self.term.handle.layers), strict=True):
            pull = pulls.get(id(gate))
            if grad is not None and scale is not None:
                grad = grad / scale.to(grad.device)
            total.append(pull if grad is None else grad if pull is None else grad.add(pull))
        self._adam.step(gates, total)

    def _look(self) -> None:
        """Warns, once each, of what keeps gates from being trained as they should."""
        if self._without_ours:
            self._without_ours = False
            self._warn(
                "the loaded optimizer state has nothing of the constraint, so multipliers, "
                "schedule and step count are not restored. Attach before you save and before you "
                "load; in a distributed checkpoint also save `constraint.attachment`"
            )
        if not self.term.learns:
            return
        if self._resumed and not self.taken:
            self._warn(
                "the optimizer had a state before attach, and it has nothing of the constraint. To "
                "resume a training, attach first and then load the optimizer's state"
            )
        gates = self.gates()
        if not all(gate.requires_grad for gate in gates):
            self._warn(
                "gates do not require grad, so they do not learn: something froze them after "
                "attach. Call log_alpha.requires_grad_() on the gated layers"
            )
        versions = [gate._version for gate in gates]
        touched = self._versions and versions != self._versions
        self._touched = self._touched + 1 if touched else 0
        if self._touched > 1:  # once is a state that was loaded
            self._warn(
                "something else changes the gates between two steps. If a second optimizer has "
                "them, attach it too: attach([first, second])"
            )

    def _warn(self, words: str) -> None:
        if words not in self._warned:
            self._warned.add(words)
            _warnings.warn(f"attach: {words}")

    # --- the state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Steps, moments of the gates, and the constraint's own state.

        `optimizer.state_dict()` has it. Checkpoints that take the optimizer's state apart, such as
        those of `torch.distributed.checkpoint`, need it beside that: an attachment can be saved
        and loaded like a model or an optimizer, as one entry of what is saved.
        """
        return {
            "taken": self.taken,
            "steps": self.steps,
            "gates": self._adam.state_dict(self.gates()),
            "constraint": self.term.state_dict(),
        }

    def check_state(self, state: Any) -> None:
        """Refuses a state that is not one of an attachment."""
        if not isinstance(state, dict) or {"taken", "steps", "gates", "constraint"} - state.keys():
            _checks.refuse("state", type(state).__name__, "the state of an attached constraint")
        self.term.check_state(state["constraint"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a state was saved.

        Raises:
            ValueError: it is the state of constraints on something else.
        """
        self.check_state(state)
        self.term.load_state_dict(state["constraint"])
        self._adam.load_state_dict(self.gates(), state["gates"])
        self.taken, self._just_loaded = state["taken"], True
        self._resumed = self._without_ours = False
        if state["steps"] != self.steps:
            self._warn(
                f"the state is of a training of {state['steps']} steps, this one has {self.steps}: "
                "schedule and settling will not come where they did"
            )
        self._versions = []

    def _save(self, _optimizer: Any, state: dict[str, Any]) -> None:
        state[STATE] = self.state_dict()

    def _check(self, _optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        state = dict(state)
        self._loaded = state.pop(STATE, None)
        if self._loaded is not None:
            self.check_state(self._loaded)
        return state

    def _load(self, _optimizer: Any) -> None:
        loaded, self._loaded = self._loaded, None
        # Unless the attachment has loaded its own, or does so before the next step.
        self._without_ours = loaded is None and not self._just_loaded
        if loaded is not None:
            self.load_state_dict(loaded)
