"""Ops of torch.library called without their dispatch, which is most of a small call's host time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Gradient = Callable[..., Any]
"""(the backward op or its body, ctx, the results' gradients) -> the inputs' gradients."""


def op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A torch.library op that keeps the function it is made of, as `body`."""

    def make(body: Callable[..., Any]) -> Any:
        made: Any = torch.library.custom_op(name, mutates_args=())(body)
        made.body = body
        return made

    return make


def is_possible() -> bool:
    """Whether nobody but autograd looks at a call: no compiler, no export, no dispatch mode (fake
    tensors have one), no vmap."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


def function(
    op: Any, backward: Any, gradient: Gradient, setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """The call of an op that has a gradient: its bodies as an autograd Function, if possible."""

    body, backward_body = op.body, backward.body

    def differentiate(ctx: Any, *gradients: Any) -> Any:
        return gradient(backward_body, ctx, *gradients)

    differentiate_once = once_differentiable(differentiate)

    class L0fastDirect(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = body(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            # Its guard costs as much as a launch, and only create_graph needs it.
            if torch.is_grad_enabled():
                return differentiate_once(ctx, *gradients)
            return differentiate(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        return L0fastDirect.apply(*inputs) if is_possible() else op(*inputs)

    op.register_autograd(lambda *values: gradient(backward, *values), setup_context=setup_context)
    return call
