"""What the gated layers share (see `linear` and `conv`)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from l0fast import _checks, autograd, functional
from l0fast.layers.dense_types import dense_type_of
from l0fast.layers.draw import Drawn, OnDevice, OpenCounts
from l0fast.layers.options import check_options
from l0fast.layers.serving import Share, drop_index
from l0fast.layers.takeover import OF_GATES, own_state
from l0fast.maths.gated_weight import mask
from l0fast.maths.hard_concrete import HardConcrete

DENSITY_INIT = 0.9
DROPRATE_STD = 0.01
"""Spread of log_alpha around its mean in the published initialisation (droprate_init)."""


class Gated(Drawn):
    """What the gated layers share: where the gates sit, their log_alpha, and how z is had.

    Training draws z; evaluation takes its median. A layer inside a model that `sparsify_` has
    prepared uses the draw made for the whole model at the start of that model's forward; a layer
    used alone draws its own.

    Args:
        gates: "input" (a gate on each input unit or channel), "output" (on each output unit or
            channel, its bias included) or "weight" (on each single weight).
        density_init: the open probability every gate starts with, in (0, 1].
        droprate_init: for replicating papers: log_alpha ~ N(log((1 - d) / d), 0.01); this
            names no density (droprate 0.5 starts at density 0.832). Not with `density_init`.
        distribution: of every gate; HardConcrete() by default.
        noise: "batch" (one sample serves all examples) or "example" (each has its own; not for
            gates on single weights).
    """

    dense_type: type[nn.Module]
    """The class of the ordinary layer."""
    weight: nn.Parameter
    bias: nn.Parameter | None
    _full: tuple[int, int] | None = None
    """Number of gates and group size before any gate was removed for good."""

    def _init_gates(
        self,
        gates: str,
        density_init: float | None,
        droprate_init: float | None,
        distribution: HardConcrete | None,
        noise: str,
        units: int = 1,
        shared: Gated | None = None,
        share: Share | None = None,
    ) -> None:
        if not self.weight.numel():
            _checks.refuse("weight", tuple(self.weight.shape), "one that is not empty; exclude it")
        self.gates, self.noise, self.units = gates, noise, units
        self.distribution = functional.checked_distribution(distribution)
        if shared is not None:
            self.distribution, self.log_alpha = shared.distribution, shared.log_alpha
            return
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        shape = self._gate_shape() if share is None else (share.total,)
        log_alpha = torch.full(shape, 0.0, dtype=dtype, device=self.weight.device)
        if droprate_init is not None:
            mean = math.log(1 - droprate_init) - math.log(droprate_init)
            log_alpha.normal_(mean, DROPRATE_STD)
        else:
            log_alpha.fill_(self.distribution.log_alpha(density_init or DENSITY_INIT))
        self.log_alpha = nn.Parameter(log_alpha)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        *,
        gates: str | None = None,
        density_init: float | None = None,
        droprate_init: float | None = None,
        distribution: HardConcrete | None = None,
        noise: str = "batch",
        units: int = 1,
        shared: Gated | None = None,
        share: Share | None = None,
    ) -> Self:
        """A gated layer that shares the very parameters (and hooks) of a dense one.

        Args:
            layer: of the dense class, or of a subclass that keeps its forward.
            gates, density_init, droprate_init, distribution, noise: as in `Gated`.
            units: with gates on inputs, how many consecutive ones each gate serves: those of an
                attention head, say.
            shared: another gated layer, which reads the same units: its gates are this one's too.
            share: which of them it has, where each of those that share them has a part.

        Raises:
            TypeError: `layer` is of another class, or its subclass has another forward.
            ValueError: an option is out of its range.
        """
        if isinstance(layer, Gated) or not cls._stands_for(layer):
            _checks.refuse("layer", type(layer).__name__, cls._expected(), TypeError)
        gates = gates or cls.default_gates
        check_options(gates, density_init, droprate_init, noise)
        _checks.whole("units", units)
        self = cls.__new__(cls)
        self.__dict__.update(own_state(layer))
        if units > 1 and gates != "input":
            _checks.refuse("units", units, f"1 where gates={gates!r}")
        if self._num_inputs() % units:
            _checks.refuse("units", units, f"a divisor of its {self._num_inputs()} inputs")
        number = self._num_inputs() // units
        if share is not None:
            share.check(gates, number)
            self.set_index(share.places(self.weight.device))
            number = share.total
        if shared is not None:
            mine, theirs = (gates, number), (shared.gates, shared.log_alpha.numel())
            if mine != theirs or gates != "input":
                got = f"{theirs[1]} gates on its {theirs[0]}s"
                _checks.refuse("shared", got, f"a layer with {mine[1]} gates on its inputs")
        start = density_init, droprate_init, distribution
        self._init_gates(gates, *start, noise, units, shared, share)
        return self

    default_gates: ClassVar[str]

    @classmethod
    def _stands_for(cls, layer: nn.Module) -> bool:
        """Whether a dense layer is one that this class gates."""
        return dense_type_of(type(layer)) is cls.dense_type

    @classmethod
    def _expected(cls) -> str:
        return f"a torch.nn.{cls.dense_type.__name__}"

    # --- the gates -----------------------------------------------------------------------------

    def _gate_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _num_inputs(self) -> int:
        raise NotImplementedError

    def remember_size(self) -> None:
        """Keeps counting against the size of now when gates are removed for good."""
        if self._full is None:
            self._full = self.num_gates, self.group_size

    @property
    def all_gates(self) -> int:
        """How many gates the layer had at first, before any was removed for good."""
        return self.num_gates if self._full is None else self._full[0]

    @property
    def group_size(self) -> int:
        """How many parameters one gate controls (or did, before units were removed for good); a
        bias counts where it is gated."""
        if self._full is not None:
            return self._full[1]
        biases = 1 if self.gates == "output" and self.bias is not None else 0
        return self.weight.numel() // max(self.num_gates, 1) + biases

    def _z(self) -> Tensor:
        """Gates that serve this whole call, one for each unit."""
        return self.spread(self._drawn().to(self.weight.dtype))

    def _example_z(self, x: Tensor, dim: int) -> Tensor:
        """Gates for each example of `x`, over its dimension `dim` < 0, ready to multiply it;
        without noise, the same for all."""
        batched = x.dim() > -dim and self.is_drawn
        examples = x.shape[0] if batched else 1
        shape = [1] * x.dim()
        if not self.is_drawn:
            z = self.spread(self.evaluation_gates())
        else:
            log_alpha = self.log_alpha.expand(examples, -1)
            z = self.spread(functional.hard_concrete(log_alpha, distribution=self.drawn_from).z)
        shape[dim] = z.shape[-1]
        if batched:
            shape[0] = examples
        return z.to(x.dtype).view(shape)

    def _masked(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias with their gates multiplied in."""
        if self.gates == "weight":
            if not self.is_drawn or not self.training:
                return mask(self.weight, self._z(), None), self.bias
            masked, expected_open = functional.gated_weight(
                self.weight, self.log_alpha, distribution=self.drawn_from
            )
            self._count(OpenCounts(expected_open))
            return masked, self.bias
        z = self._z()
        if self.gates == "output":
            bias = None if self.bias is None else self.bias * z
            return self._mask_outputs(self.weight, z), bias
        return self._mask_inputs(self.weight, z), self.bias

    def _mask_inputs(self, weight: Tensor, z: Tensor) -> Tensor:
        return autograd.scaled_weight(weight, z, 1)

    def _mask_outputs(self, weight: Tensor, z: Tensor) -> Tensor:
        return autograd.scaled_weight(weight, z, 0)

    def _parts(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, masked weight and bias of this call: all of them, or what its gates leave open.

        Args:
            x: the input, with its channels along `dim` < 0.
        """
        compact = self._compact_here()
        if compact is None:
            return (x, *self._masked())
        assert not isinstance(compact, OnDevice)  # for layers that only compute in parts
        rows, cols, gather = compact
        if gather is not None:
            x = autograd.gather(x, gather, dim)
        by_output = self.gates == "output"
        z = self._z()
        return x, *autograd.compact_weight(
            self.weight, self.bias, z, 0 if by_output else 1, rows, cols
        )

    def dense(self) -> nn.Module:
        """The ordinary layer of the very parameters (and hooks) of this one, without gates."""
        dense = self.dense_type.__new__(self.dense_type)
        dense.__dict__.update(own_state(self, without=OF_GATES))
        del dense._parameters["log_alpha"]
        drop_index(dense)
        return dense

    def folded(self, z: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
        """The ordinary layer with `z` (of log_alpha's shape) multiplied into its parameters.

        Parameters that no gate multiplies are the very ones of this layer; the others are new.

        Args:
            z: the gates.
            dtype: of all its parameters; this layer's by default.
        """
        dense = self.dense()
        weight = self.weight.detach().to(dtype or self.weight.dtype)
        bias = None if self.bias is None else self.bias.detach().to(weight.dtype)
        z = self.spread(z.detach().to(weight.dtype))
        if self.gates == "weight":
            weight = mask(weight, z, None)
        elif self.gates == "output":
            weight = self._mask_outputs(weight, z)
            bias = None if bias is None else bias * z
        else:
            weight = self._mask_inputs(weight, z)
        dense.weight = nn.Parameter(weight, self.weight.requires_grad)
        if self.bias is not None and bias is not None and (dtype or self.gates == "output"):
            dense.bias = nn.Parameter(bias, self.bias.requires_grad)
        return dense

    # --- what a module must do ------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The state of the dense layer loads too: the gates then stay as they are.
        own = {"_extra_state": self.get_extra_state()}
        dense = prefix + "_extra_state" not in state_dict
        if dense and prefix + "weight" in state_dict:
            own["log_alpha"] = self.log_alpha.detach()
        lacking = {
            prefix + name: one for name, one in own.items() if prefix + name not in state_dict
        }
        state_dict.update(lacking)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        for key in lacking:
            del state_dict[key]

    def extra_repr(self) -> str:
        units = f", units={self.units}" if self.units > 1 else ""
        return f"{super().extra_repr()}, gates={self.gates!r}{units}"  # type: ignore[misc]
