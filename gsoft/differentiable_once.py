"""Gradients that have no gradients themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from gsoft.errors import GSOFTError

Backward = Callable[..., Any]


def differentiable_once(backward: Backward) -> Backward:
    """A decorator of `backward` of a `torch.autograd.Function`: to differentiate its results is an error.

    PyTorch's `once_differentiable` raises only if the gradient that comes in has a graph itself. Otherwise second
    derivatives are silently zero, for example those of a gradient penalty.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # the compiler refuses by itself
            return results
        results = results if isinstance(results, tuple) else (results,)
        return tuple(None if result is None else _NotAgain.apply(result.requires_grad_()) for result in results)

    return once


class _NotAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise GSOFTError(
            "a layer with a GSOFT adapter has no second derivatives (a gradient penalty, create_graph=True); merge the "
            "adapter first (adapter.merge()) if only inputs need them"
        )
