"""Activation checkpointing: blocks keep their input alone and run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mdltool.wrapping import Route, find


def recompute(net: nn.Module, paths: Iterable[str], route: Route) -> None:
    """Make the modules at these paths run again in the backward pass, whatever wraps them."""
    for path in paths:
        module = find(net, path)
        module.forward = partial(_forward, module.forward, module, route)


def _forward(forward: Callable[..., Any], module: nn.Module, route: Route, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    state = dict(vars(route))
    contexts = partial(_contexts, module, route, state)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(module: nn.Module, route: Route, state: dict[str, Any]) -> tuple[Any, Any]:
    return nullcontext(), _second_time(module, route, state)


@contextmanager
def _second_time(module: nn.Module, route: Route, state: dict[str, Any]) -> Iterator[None]:
    """What was routed then is routed again, and running statistics move once."""
    later = dict(vars(route))
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    vars(route).update(state)
    try:
        yield
    finally:
        vars(route).update(later)
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
