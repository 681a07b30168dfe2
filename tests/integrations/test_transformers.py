"""The callback for Hugging Face's Trainer takes the plain loop's training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from l0fast import gates, prune
from tests.helpers.digits import (
    BATCH,
    STEPS,
    TARGET,
    Seeded,
    assert_same_training,
    assert_within,
    constrained,
    digits,
    plain,
    prepared,
)
from tests.helpers.thinned import thinned

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from l0fast.integrations.transformers import L0Callback  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[row], "labels": self.y[row]}

    def __init__(self) -> None:
        self.x, self.y, _, _ = digits()


class InOrder(transformers.Trainer):
    """Batches in the order of the data."""

    def _get_train_sampler(self, *_args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(out: Path, parts: int = 1, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "save_strategy": "no",
        "per_device_train_batch_size": BATCH // parts,
        "gradient_accumulation_steps": parts,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 50,
        "use_cpu": True,
        "optim": "adamw_torch",
    }
    return transformers.TrainingArguments(output_dir=str(out), **{**defaults, **options})


def callback() -> L0Callback:
    return L0Callback(target=TARGET, measure="params", example_inputs={"x": torch.zeros(2, 64)})


def fit(out: Path, net: nn.Module, made: L0Callback, parts: int = 1, **options: Any) -> Any:
    *_, x, y = digits()
    test = [{"x": one, "labels": label} for one, label in zip(x, y, strict=True)]
    return InOrder(
        Seeded(net, parts),
        arguments(out, parts, **options),
        train_dataset=Rows(),
        eval_dataset=test,
        callbacks=[made],
    )


@pytest.fixture(scope="module")
def expected() -> tuple[nn.Module, Any]:
    torch.set_num_threads(1)
    return plain()


@pytest.mark.parametrize("parts", thinned([4, 1], 2))
def test_it_takes_the_plain_loops_training(
    parts: int, tmp_path: Path, expected: tuple[nn.Module, Any]
) -> None:
    net, made = prepared(), callback()
    trainer = fit(tmp_path, net, made, parts)
    trainer.train()
    assert_same_training(net, expected[0])
    torch.testing.assert_close(made.constraint.multiplier, expected[1].multiplier)
    assert made.constraint.attachment is None
    assert_within(net)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert {"l0_density/model", "l0_multiplier/model"} <= rows[-1].keys()
    assert rows[-1]["l0_density/model"] <= TARGET


@pytest.mark.parametrize("stop", thinned([100, 30, 190], 3))
def test_killed_and_resumed_it_ends_bit_equal(stop: int, tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == stop:
                control.should_save = control.should_training_stop = True
            return control

    whole = prepared()
    fit(tmp_path / "whole", whole, callback()).train()
    trainer = fit(tmp_path / "parts", prepared(), callback())
    trainer.add_callback(Stop())
    trainer.train()
    net = prepared()
    resumed = fit(tmp_path / "parts", net, callback())
    resumed.model.count = stop
    resumed.train(resume_from_checkpoint=True)
    for (name, one), two in zip(whole.state_dict().items(), net.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert_within(net)


def test_the_best_model_is_one_within_the_target(tmp_path: Path) -> None:
    """Accuracy is the best before gates close: such a checkpoint is not the one that is loaded."""
    net = prepared()
    trainer = fit(
        tmp_path,
        net,
        callback(),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=10,
        eval_steps=10,
        load_best_model_at_end=True,
        metric_for_best_model="later",
        greater_is_better=False,
    )
    # Whatever is asked for, the first evaluation is the best and each later one is worse.
    trainer.compute_metrics = lambda _: {"later": trainer.state.global_step}
    trainer.train()
    assert trainer.state.best_global_step == 140  # the first after they have settled
    assert_within(net)


def test_a_constraint_of_the_users_own_and_what_is_refused(tmp_path: Path) -> None:
    net = prepared()
    own = constrained(net)
    made = L0Callback(own, start=0.5)
    fit(tmp_path, net, made, num_train_epochs=1, max_steps=-1).train()
    assert made.constraint is own
    assert_within(net)
    with pytest.raises(
        ValueError, match="constraint, target: got 'neither'; expected one of the two"
    ):
        L0Callback()
    with pytest.raises(ValueError, match="constraint, target: got 'both'"):
        L0Callback(constrained(net), target=0.5)
    with pytest.raises(TypeError, match="constraint: got 'Net'; expected a constraint"):
        L0Callback(net)
    again = fit(tmp_path, net, callback(), restore_callback_states_from_checkpoint=True)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint: got True"):
        again.train()


@pytest.mark.filterwarnings("ignore:(attach. .* steps are few|settle. the expected density)")
def test_restoring_callbacks_from_a_checkpoint_is_refused_on_resume(tmp_path: Path) -> None:
    """The Trainer makes them anew from their states, before they are told of the training."""
    short: dict[str, Any] = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10}
    fit(tmp_path, prepared(), callback(), **short).train()
    trainer = fit(tmp_path, prepared(), callback(), restore_callback_states_from_checkpoint=True)
    words = "or restore_callback_states_from_checkpoint=False where a training is resumed"
    with pytest.raises(ValueError, match=words):
        trainer.train(resume_from_checkpoint=True)


class Seen(transformers.TrainerCallback):
    """Another library's logger."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.append(dict(kwargs["logs"]))


@pytest.mark.filterwarnings("ignore:(attach. .* steps are few|settle. the expected density)")
def test_callbacks_after_it_see_its_numbers(tmp_path: Path) -> None:
    made, seen = callback(), Seen()
    trainer = fit(tmp_path, prepared(), made, max_steps=60, logging_steps=20)
    trainer.add_callback(seen)
    trainer.train()
    rows = [row for row in seen.rows if "loss" in row]
    assert rows
    for row, logged in zip(rows, trainer.state.log_history, strict=False):
        assert {"l0_density/model", "l0_multiplier/model"} <= row.keys()
        assert row == {key: logged[key] for key in row}


@pytest.mark.exhaustive
def test_bf16_leaves_no_wrapper_and_prunes(tmp_path: Path) -> None:
    net = prepared()
    trainer = fit(tmp_path, net, callback(), bf16=True)
    trainer.train()
    assert_within(net)
    small = prune(trainer.model.net, {"x": torch.zeros(2, 64)})
    assert not any("forward" in vars(module) for module in small.modules())


def test_the_best_model_needs_gates_that_settle(tmp_path: Path) -> None:
    made = L0Callback(constrained(net := prepared()), settle=0.0)
    trainer = fit(
        tmp_path,
        net,
        made,
        save_strategy="steps",
        eval_strategy="steps",
        load_best_model_at_end=True,
    )
    with pytest.raises(ValueError, match="load_best_model_at_end: got True; expected gates that"):
        trainer.train()
    assert made.constraint.attachment is None


class Interrupted(Exception):
    pass


class Interrupt(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 30:
            raise Interrupted("by hand")


@pytest.mark.parametrize("interrupted", thinned([True, False], 2))
def test_a_callback_serves_a_second_training(interrupted: bool, tmp_path: Path) -> None:
    """Its constraint is on the second model, and on the optimizer of the second trainer."""
    made = callback()
    first = fit(tmp_path, prepared(), made)
    if interrupted:
        first.add_callback(Interrupt())
        with pytest.raises(Interrupted, match="by hand"):
            first.train()
    else:
        first.train()
    net = prepared()
    fit(tmp_path, net, made).train()
    assert gates(net).constraints == (made.constraint,)
    assert_within(net)


@pytest.mark.exhaustive
def test_it_goes_on_from_a_checkpoint_without_it(tmp_path: Path) -> None:
    before = InOrder(
        Seeded(prepared()), arguments(tmp_path, save_strategy="steps", save_steps=10, max_steps=10)
    )
    before.train_dataset = Rows()
    before.train()
    net = prepared()
    trainer = fit(tmp_path, net, callback(), save_strategy="steps", save_steps=100)
    with pytest.warns(UserWarning, match="the optimizer had a state before attach"):
        trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / f"checkpoint-{STEPS}").is_dir()


def test_an_optimizer_without_the_gates_is_refused(tmp_path: Path) -> None:
    net = prepared()
    weights = [one for name, one in net.named_parameters() if not name.endswith("log_alpha")]
    optimizer = torch.optim.AdamW(weights, 1e-3)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = InOrder(
        Seeded(net),
        arguments(tmp_path),
        train_dataset=Rows(),
        callbacks=[callback()],
        optimizers=(optimizer, constant),
    )
    with pytest.raises(ValueError, match=r"optimizer: got .one without the gates of net\.body\.0"):
        trainer.train()
