"""A constraint inside the optimizer's step: the very step of the explicit loop, in any loop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import Constraints, DensityConstraint, DualAscent, L0Penalty, gates, prune, sparsify_
from l0fast.constraints.magnitude import MagnitudePruning
from l0fast.constraints.ranking import shared_magnitudes
from l0fast.layers.stages import DRAWN, OPEN, QUIET, SETTLED
from tests.helpers.thinned import telling

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 200
X = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (32,), generator=torch.Generator().manual_seed(2))
Optimizer = torch.optim.Optimizer


def made(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU())
    return sparsify_(model.append(nn.Linear(16, 3)), example_inputs=X)


def constrained(model: nn.Module, **options: Any) -> DensityConstraint:
    return DensityConstraint(model, 0.4, steps=options.pop("steps", STEPS), **options)


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def adamw(model: nn.Module, lr: float = 1e-2) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr)


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def log_alphas(model: nn.Module) -> list[Tensor]:
    return [gate.detach().clone() for gate in gates(model).parameters()]


def assert_same(model: nn.Module, other: nn.Module, **tolerance: Any) -> None:
    for (name, one), two in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, two, msg=name, **tolerance)


# --- it is the explicit loop ---------------------------------------------------------------------


def explicit(steps: int) -> tuple[nn.Module, DensityConstraint]:
    """The Lagrangian written out, with an Adam for the gates."""
    model = made()
    constraint = constrained(model, start=0.05, dual=DualAscent(5.0, restarts=False))
    alphas = gates(model).parameters()
    ids = set(map(id, alphas))
    weights = torch.optim.AdamW([p for p in model.parameters() if id(p) not in ids], 1e-2)
    gate_adam = torch.optim.Adam(alphas, lr=30 / STEPS)
    for _ in range(steps):
        (loss_of(model) + constraint()).backward()
        for one in (weights, gate_adam):
            one.step()
            one.zero_grad()
        constraint.step()
    return model, constraint


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "has the gates": adamw,
    "fused": lambda model: torch.optim.AdamW(model.parameters(), 1e-2, fused=True),
    "lacks the gates": lambda model: torch.optim.AdamW(
        [p for name, p in model.named_parameters() if "log_alpha" not in name], 1e-2
    ),
    "has them at another rate": lambda model: torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if "log_alpha" not in n]},
            {"params": gates(model).parameters(), "lr": 10.0, "weight_decay": 5.0},
        ],
        1e-2,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_takes_the_steps_of_the_explicit_loop(name: str) -> None:
    expected, multiplier = explicit(30)
    model = made()
    optimizer = OPTIMIZERS[name](model)
    constraint = constrained(model, start=0.05, dual=DualAscent(5.0, restarts=False))
    constraint.attach(optimizer, settle=0)
    train(model, optimizer, 30)
    assert float(constraint.taken) == 20  # the first 10 were the start
    assert_same(model, expected, rtol=1e-4, atol=1e-5)
    assert float(multiplier.multiplier) > 0
    torch.testing.assert_close(constraint.multiplier, multiplier.multiplier, rtol=1e-4, atol=1e-5)
    assert all(gate.grad is None for gate in gates(model).parameters())


def test_the_second_call_of_a_step_is_refused() -> None:
    model = made()
    constraint = constrained(model).attach(adamw(model))
    with pytest.raises(
        RuntimeError, match=r"it is attached, so .* Take the term in the loss out of the training"
    ):
        constraint()
    with pytest.raises(RuntimeError, match=r"it is attached, so .* Take step\(\) out of the trai"):
        constraint.step()
    with torch.no_grad():
        assert constraint().shape == ()


def test_accumulated_gradients_are_one_step() -> None:
    def run(parts: int) -> tuple[nn.Module, DensityConstraint]:
        model = made()
        optimizer = adamw(model)
        constraint = constrained(model).attach(optimizer, start=0, settle=0)
        for step in range(12):
            for part in range(parts):
                torch.manual_seed(step)  # the same gates for each part
                rows = slice(part * 32 // parts, (part + 1) * 32 // parts)
                (F.cross_entropy(model(X[rows]), Y[rows]) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, constraint

    (whole, once), (parted, four) = run(1), run(4)
    assert_same(whole, parted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(once.multiplier, four.multiplier)
    assert float(once.taken) == float(four.taken) == 12


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_a_scaled_loss_trains_gates_alike(fused: bool, held: bool) -> None:
    def run(scale: float | None) -> nn.Module:
        model = made()
        own = [p for n, p in model.named_parameters() if held or "log_alpha" not in n]
        optimizer = torch.optim.SGD(own, 0.1, fused=fused)
        constraint = constrained(model).attach(optimizer, start=0, settle=0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(10):
            scaler.scale(loss_of(model)).backward()  # pyright: ignore[reportUnknownMemberType]
            if step == 5 and scale is not None:
                first = next(model.parameters())
                assert first.grad is not None
                before = log_alphas(model), int(constraint.taken)
                spoiled, good = first.grad.clone().fill_(torch.inf), first.grad.clone()
                first.grad.copy_(spoiled)
                scaler.step(optimizer)
                scaler.update(scale)
                after = log_alphas(model), int(constraint.taken)
                assert before[1] == after[1]
                assert all(map(torch.equal, before[0], after[0]))
                optimizer.zero_grad()
                del good
                torch.manual_seed(99)
                scaler.scale(loss_of(model)).backward()
            elif step == 5:
                optimizer.zero_grad()
                torch.manual_seed(99)
                loss_of(model).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model

    assert_same(run(None), run(1024.0), rtol=1e-4, atol=1e-5)


def test_clipping_leaves_the_constraint_alone() -> None:
    """All of the task's gradient clipped away: the gates go down by the constraint's alone."""
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    constraint = constrained(model).attach(optimizer, start=0, settle=0)
    constraint.multiplier.fill_(1.0)
    before = log_alphas(model)
    loss_of(model).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-30)
    optimizer.step()
    # Adam's first step is its whole learning rate.
    for now, then in zip(log_alphas(model), before, strict=True):
        torch.testing.assert_close(now, then - constraint.attachment.gate_lr)  # type: ignore[union-attr]


@pytest.mark.parametrize("schedule", ["zero", "one cycle"])
def test_the_learning_rate_of_the_weights_is_not_the_gates(schedule: str) -> None:
    model = made()
    optimizer = adamw(model, 0.0 if schedule == "zero" else 1e-2)
    constrained(model).attach(optimizer, start=0, settle=0)
    if schedule == "one cycle":
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-9, total_steps=30)
    before = log_alphas(model)
    train(model, optimizer, 10)
    moved = [float((a - b).abs().mean()) for a, b in zip(log_alphas(model), before, strict=True)]
    assert min(moved) > 0.1


# --- closures, several optimizers ----------------------------------------------------------------


class Sharp(torch.optim.SGD):
    """A step with two evaluations, the second at weights that the first has moved."""

    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        loss = closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in moved]
        with torch.no_grad():
            for p in moved:
                p.add_(p.grad, alpha=0.01)
        closure()
        with torch.no_grad():
            for p, old in zip(moved, before, strict=True):
                p.copy_(old)
        super().step()
        return loss


def closure_of(model: nn.Module, optimizer: Optimizer, seen: list[Any]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        (board, place) = next(iter(gates(model).layers.values()))._places[0]
        seen.append(board.latest.z[place].detach().clone())
        return loss

    return closure


@pytest.mark.parametrize("kind", [Sharp, torch.optim.LBFGS, torch.optim.AdamW])
def test_every_evaluation_of_a_step_draws_the_same_gates(kind: Any) -> None:
    model = made()
    optimizer = kind(model.parameters(), lr=0.1)
    constraint = constrained(model).attach(optimizer, start=0, settle=0)
    drawn: list[list[Tensor]] = []
    for _ in range(6):
        before = log_alphas(model)
        seen: list[Tensor] = []
        optimizer.step(closure_of(model, optimizer, seen))
        drawn.append(seen)
        assert all(torch.equal(seen[0], one) for one in seen)
        assert not all(map(torch.equal, before, log_alphas(model)))
        bound = constraint.attachment.gate_lr * 1.01 if len(drawn) == 1 else torch.inf  # type: ignore[union-attr]
        moves = [(a - b).abs().max() for a, b in zip(log_alphas(model), before, strict=True)]
        assert max(moves) <= bound  # only the gates' own Adam has moved them
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert int(constraint.taken) == 6
    assert all(gate.isfinite().all() for gate in log_alphas(model))


def test_a_closure_adds_to_what_was_accumulated() -> None:
    """As Lightning does: the last of several backward passes is inside the step."""

    def run(inside: bool) -> nn.Module:
        model = made()
        optimizer = adamw(model)
        constrained(model).attach(optimizer, start=0, settle=0)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            if inside:
                optimizer.step(lambda: loss_of(model).backward())  # type: ignore[arg-type]
            else:
                loss_of(model).backward()
                optimizer.step()
        return model

    assert_same(run(True), run(False), rtol=0, atol=0)


def test_two_optimizers_take_one_step() -> None:
    model = made()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    first, second = torch.optim.Muon(matrices, 1e-2), torch.optim.AdamW(vectors, 1e-2)
    constraint = constrained(model).attach([first, second], start=0, settle=0)
    for order in ([first, second], [second, first]) * 4:
        loss_of(model).backward()
        before = log_alphas(model)
        for one in order:
            one.step()
            one.zero_grad()
        assert not all(map(torch.equal, before, log_alphas(model)))
    assert int(constraint.taken) == 8
    state: Any = second.state
    assert all(gate not in state for gate in gates(model).parameters())


def test_an_optimizer_that_moves_the_gates_too_is_told() -> None:
    model = made()
    first, second = adamw(model), torch.optim.SGD(gates(model).parameters(), 0.1)
    constrained(model).attach(first, start=0, settle=0)

    def step() -> None:
        loss_of(model).backward()
        second.step()
        first.step()
        first.zero_grad()

    step()
    step()
    with pytest.warns(UserWarning, match="If a second optimizer has them, attach it too"):
        step()
    step()  # it is told once


# --- from the start to the end -------------------------------------------------------------------


def test_the_start_is_dense_and_ends_with_gates_by_magnitude() -> None:
    model = made()
    optimizer = adamw(model)
    handle = gates(model)
    before = log_alphas(model)
    constraint = constrained(model).attach(optimizer, start=0.25)
    assert constraint.starting
    dense = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU())
    dense.append(nn.Linear(16, 3)).load_state_dict(model.state_dict(), strict=False)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(X), dense(X))
    model.train()
    train(model, optimizer, 49)
    assert {layer.stage for layer in handle.layers.values()} == {OPEN}
    assert all(map(torch.equal, before, log_alphas(model)))
    assert float(constraint.multiplier) == float(constraint.taken) == 0
    loss_of(model).backward()
    optimizer.step()  # the 50th of 200
    assert {layer.stage for layer in handle.layers.values()} == {QUIET}
    for name, sizes in shared_magnitudes(handle.layers).items():
        log_alpha = handle.layers[name].log_alpha.detach()
        assert torch.equal(log_alpha.argsort(), sizes.argsort())
    every = torch.cat(log_alphas(model))
    assert (float(every.min()), float(every.max())) == (-2.0, 6.0)
    torch.testing.assert_close(constraint.start, constraint.densities().detach())


def test_gates_settle_in_time_and_the_target_is_held() -> None:
    model = made()
    optimizer = adamw(model)
    constraint = constrained(model).attach(optimizer, settle=0.2)
    stages: list[str] = []
    for _ in range(STEPS):
        train(model, optimizer, 1)
        stages.append(gates(model).layers["0"].stage)
    assert stages == [OPEN] * 29 + [QUIET] * 130 + [SETTLED] * 41
    small: Any = prune(model, X)
    assert 0.3 < small.report.density <= 0.4
    assert small.report.forced == 0
    torch.testing.assert_close(small(X), model.eval()(X))
    assert constraint.settled


def test_copies_settle_with_their_model_unless_they_have_their_own() -> None:
    model = made()
    optimizer = adamw(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    constrained(model).attach(optimizer)
    other = copy.deepcopy(model)
    DensityConstraint(other, 0.5)
    train(model, optimizer, STEPS)
    assert gates(average.module).settled
    assert not gates(other).settled
    torch.testing.assert_close(average.train()(X), average(X))  # no noise
    small: Any = prune(average.module, X, target=0.4)
    assert small.report.density <= 0.4


def test_a_state_says_what_the_gates_are() -> None:
    model = made()
    optimizer = adamw(model)
    constrained(model).attach(optimizer)
    train(model, optimizer, 100)
    quiet = copy.deepcopy(model.state_dict())
    train(model, optimizer, 100)
    settled = model.state_dict()
    fresh = made(1)
    for state, stage in ((settled, SETTLED), (quiet, QUIET)):
        fresh.load_state_dict(state)
        assert {layer.stage for layer in gates(fresh).layers.values()} == {stage}


def test_a_checkpoint_from_before_the_target_is_told_when_it_is_pruned() -> None:
    model = made()
    optimizer = adamw(model)
    constraint = constrained(model).attach(optimizer)
    train(model, optimizer, 60)
    early = copy.deepcopy(model.state_dict())
    train(model, optimizer, STEPS - 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(model, X)
    model.load_state_dict(early)  # as load_best_model_at_end does
    layers = gates(model).layers.values()
    left = sum(int((layer.evaluation_gates() > 0).sum()) for layer in layers)
    with pytest.warns(
        UserWarning, match=rf"prune: closes \d+ of the {left} gates that are open"
    ) as seen:
        small: Any = prune(model, X)
    assert seen[0].filename == __file__
    assert small.report.density <= 0.4 < constraint.densities()


def test_detach_gives_the_loop_back() -> None:
    model = made()
    weights = [p for n, p in model.named_parameters() if "log_alpha" not in n]
    optimizer = torch.optim.SGD(weights, 0.1)
    constraint = constrained(model).attach(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    constraint.detach()
    constraint.detach()
    assert optimizer.param_groups[0]["params"] == weights
    assert gates(model).layers["0"].stage == DRAWN
    before = log_alphas(model)
    (loss_of(model) + constraint()).backward()
    optimizer.step()
    constraint.step()
    assert all(map(torch.equal, before, log_alphas(model)))
    assert "l0fast" not in optimizer.state_dict()
    constraint.attach(optimizer)


# --- other terms ---------------------------------------------------------------------------------


def test_penalty_magnitude_and_several_attach_too() -> None:
    for kind in ("penalty", "magnitude", "several"):
        model = made()
        optimizer = adamw(model)
        if kind == "penalty":
            term: Any = L0Penalty(model, 2.0)
            with pytest.raises(ValueError, match="steps: got None"):
                term.attach(optimizer)
            term.attach(optimizer, steps=STEPS)
        elif kind == "magnitude":
            term = MagnitudePruning(model, 0.4, steps=STEPS).attach(optimizer)
        else:
            parts = [
                DensityConstraint(model, {"0": 0.5, "2": 0.6}, steps=STEPS),
                DensityConstraint(model, 0.5, measure="params", example_inputs=X, steps=STEPS),
            ]
            term = Constraints(parts).attach(optimizer)
            with pytest.raises(RuntimeError, match="attached"):
                parts[0].step()
        train(model, optimizer, STEPS)
        small: Any = prune(model, X)
        held = {"penalty": 0.9, "magnitude": 0.4, "several": 0.6}[kind]
        assert small.report.density <= held, kind
        assert small.report.forced == 0, kind


# --- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", telling([20, 90, 190], [90]))
def test_a_resumed_training_ends_bit_equal(stop: int) -> None:
    def fresh() -> tuple[nn.Module, Optimizer, DensityConstraint]:
        model = made(stop)
        optimizer = adamw(model)
        return model, optimizer, constrained(model).attach(optimizer)

    model, optimizer, constraint = fresh()
    train(model, optimizer, stop)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    train(model, optimizer, STEPS - stop)
    again, second, resumed = fresh()
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    train(again, second, STEPS - stop)
    assert_same(model, again, rtol=0, atol=0)
    assert torch.equal(constraint.multiplier, resumed.multiplier)


def test_the_state_loads_as_weights_only(tmp_path: Any) -> None:
    model = made()
    optimizer = adamw(model)
    constrained(model).attach(optimizer)
    train(model, optimizer, 60)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))


def test_a_resume_without_the_constraint_is_told() -> None:
    model = made()
    optimizer = adamw(model)
    train(model, optimizer, 2)
    plain = copy.deepcopy(optimizer.state_dict())
    constrained(model).attach(optimizer)
    with pytest.warns(
        UserWarning, match="had a state before attach, .* attach first and then load"
    ):
        train(model, optimizer, 1)
    optimizer.load_state_dict(plain)
    with pytest.warns(UserWarning, match="state has nothing of the constraint, so multipliers"):
        train(model, optimizer, 1)


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    model = made()
    optimizer = adamw(model)
    constraint = constrained(model).attach(optimizer)
    train(model, optimizer, 80)
    state = copy.deepcopy(optimizer.state_dict())
    other = made()
    second = adamw(other)
    DensityConstraint(other, {"2": 0.3}, steps=STEPS).attach(second)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="state_dict: got 'constraints on"):
        second.load_state_dict(state)
    after = other.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    state["l0fast"] = {"taken": 3}
    with pytest.raises(ValueError, match="state: got 'dict'; expected the state of an attached"):
        optimizer.load_state_dict(state)
    assert constraint.attachment is not None
    assert constraint.attachment.taken == 80


# --- what is refused and told --------------------------------------------------------------------


@pytest.fixture
def model() -> nn.Module:
    return made()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settle": 1.0}, r"settle: got 1.0; expected a share in \[0, 1\)"),
        ({"start": -0.1}, r"start: got -0.1; expected a share in \[0, 1\)"),
        ({"start": 0.5, "settle": 0.5}, r"start \+ settle: got 1.0; expected less than 1"),
        ({"gate_lr": 0.0}, "gate_lr: got 0.0; expected a number > 0"),
        ({"steps": 0}, "steps: got 0"),
    ],
)
def test_options_out_of_range_are_refused(
    model: nn.Module, options: dict[str, Any], message: str
) -> None:
    constraint = constrained(model)
    with pytest.raises(ValueError, match=message):
        constraint.attach(adamw(model), **options)
    assert constraint.attachment is None


def test_what_is_no_optimizer_is_refused(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"optimizer: got 'Sequential'; expected a torch\.optim"):
        constrained(model).attach(model)
    with pytest.raises(TypeError, match=r"optimizer: got \[\]"):
        constrained(model).attach([])


def test_steps_that_nobody_named_are_asked_for(model: nn.Module) -> None:
    constraint = DensityConstraint(model, 0.4)
    with pytest.raises(ValueError, match="steps: got None; expected the number of optimizer steps"):
        constraint.attach(adamw(model))


def test_a_second_attached_constraint_is_refused(model: nn.Module) -> None:
    optimizer = adamw(model)
    constraint = constrained(model).attach(optimizer)
    for one in (constraint, constrained(model)):
        with pytest.raises(ValueError, match="one attached constraint on a model"):
            one.attach(optimizer)


def test_frozen_gates_are_refused_and_told(model: nn.Module) -> None:
    optimizer = adamw(model)
    for gate in gates(model).parameters():
        gate.requires_grad_(False)
    constraint = constrained(model)
    with pytest.raises(ValueError, match=r"gates that do not require grad: 0, 2, 4"):
        constraint.attach(optimizer)
    for gate in gates(model).parameters():
        gate.requires_grad_()
    constraint.attach(optimizer)
    gates(model).parameters()[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="something froze them"):
        train(model, optimizer, 60)


def test_an_optimizer_with_a_state_before_its_first_step_is_new(model: nn.Module) -> None:
    optimizer = torch.optim.Adagrad(model.parameters())
    constrained(model).attach(optimizer)
    assert optimizer.state
    train(model, optimizer, 2)


def test_a_training_that_is_too_short_is_told(model: nn.Module) -> None:
    own = [p for name, p in model.named_parameters() if "log_alpha" not in name]
    optimizer = torch.optim.AdamW(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="199 steps are few"):
            constrained(model, steps=199).attach(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(own)  # nothing has changed
    with pytest.warns(UserWarning, match="199 steps are few"):
        constrained(model, steps=199).attach(adamw(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constrained(made(), steps=STEPS).attach(adamw(made()))


def test_a_model_in_half_precision_may_hold_its_constraint() -> None:
    model = made()
    holder: Any = nn.ModuleDict({"model": model})
    holder["constraint"] = constrained(model)
    holder.to(torch.bfloat16)
    assert holder["constraint"].multiplier.dtype == torch.float32
    optimizer = adamw(holder)
    holder["constraint"].attach(optimizer)
    for _ in range(60):
        F.cross_entropy(model(X.bfloat16()).float(), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(holder["constraint"].taken) == 30
    assert "_attachment" not in vars(copy.deepcopy(holder["constraint"]))
