"""Getting a dispatch mode of ours out of the way, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


@contextmanager
def paused(mode: Any) -> Iterator[None]:
    """Run a block unseen by ``mode``; off the stack where possible, which costs nothing per operator."""
    top = torch._C._len_torch_dispatch_stack()
    popped = top > 0 and torch._C._get_dispatch_stack_at(top - 1) is mode
    if popped:
        torch._C._pop_torch_dispatch_stack(None)
    mode.depth += 1
    try:
        yield
    finally:
        mode.depth -= 1
        if popped:
            torch._C._push_on_torch_dispatch_stack(mode)


def leave(mode: Any) -> None:
    """Take ``mode`` off the stack, also when a suspended generator left others above it."""
    above = []
    while mode in _get_current_dispatch_mode_stack():
        top = torch._C._pop_torch_dispatch_stack(None)
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        torch._C._push_on_torch_dispatch_stack(other)
