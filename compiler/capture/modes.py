"""What the recorder of a window and the tracer of a function have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaoptim.compiler.compat import (
    TorchDispatchMode,
    dispatch_modes,
    forward_mode_level,
    keep_from_dynamo,
    pop_dispatch_mode,
    push_dispatch_mode,
    tops_dispatch,
)
from metaoptim.errors import CaptureError

from ..ir.operators import (
    BATCH_NORM,
    INDEXING,
    OFFSETS,
    PLAIN_NORM,
    WRONG_IN_FORWARD_MODE,
    from_the_front,
    lifts,
    op_info,
    without_running_stats,
)
from ..ir.values import Entry, Number, Spy, Value

aten = torch.ops.aten


class CaptureMode(TorchDispatchMode):
    """A dispatch mode of ours; what Python's entry points ask of the one at hand (`intercept`).

    Attributes:
        symbolic: whether tensors are fake; otherwise their values may be looked at.
        depth: above 0, everything passes through unseen.
    """

    symbolic: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's default would wrap every call."""
        return False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__torch_dispatch__" in vars(cls):
            keep_from_dynamo(cls.__torch_dispatch__)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run a block of our own unseen; off the stack where possible, which costs nothing per operator."""
        popped = tops_dispatch(self)
        if popped:
            pop_dispatch_mode()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if popped:
                push_dispatch_mode(self)

    def __enter__(self) -> CaptureMode:
        """Torch's own `__enter__` also sets a flag for all threads, which `close` would leave set."""
        push_dispatch_mode(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take this mode off the stack, also when a suspended generator left others above it."""
        above = []
        while self in dispatch_modes():
            top = pop_dispatch_mode()
            if top is self:
                break
            above.append(top)
        for other in reversed(above):
            push_dispatch_mode(other)

    def apply_function(self, cls: Any, apply: Callable, args: tuple, kwargs: dict) -> Any:
        """Record a custom `autograd.Function` as one call: its backward is the user's, not that of its inner ops."""
        raise NotImplementedError

    def watch(self, t: Tensor, what: str) -> bool:
        """``t`` is about to get a hook, or to retain its gradient; whether autograd itself sees to that gradient."""
        raise NotImplementedError

    def add_hook(self, t: Tensor, spy: Spy, handle: Any) -> None:
        """Note that the gradient of ``t`` passes through a hook."""
        raise NotImplementedError

    def detach_in_place(self, t: Tensor, detach: Callable[[Tensor], Tensor]) -> Tensor:
        """Record ``t.detach_()``, which happens above the operators."""
        raise NotImplementedError


def check_forward_mode(op: Any, args: tuple) -> None:
    """Raise where ``op`` is differentiated in forward mode, and that derivative in turn by torch's wrong formula."""
    if (
        forward_mode_level() >= 0
        and op in WRONG_IN_FORWARD_MODE
        and (op not in BATCH_NORM or args[BATCH_NORM[op][2]])  # in evaluation mode it is linear
        and torch.is_grad_enabled()
        and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    ):
        raise CaptureError(
            f"{op} within forward-mode differentiation (torch.func.jvp, jacfwd, hessian), whose result PyTorch "
            "differentiates wrongly, so the inner gradient would be wrong. Use reverse mode (torch.func.vjp, jacrev), "
            f"or plain operators; for a norm: {PLAIN_NORM}"
        )


class Writer:
    """Calls written down with tokens in the place of tensors."""

    def value_of(self, t: Tensor) -> Any:
        """What stands for ``t``."""
        raise NotImplementedError

    def bind(self, t: Tensor, ref: Any) -> Any:
        """Let ``ref`` stand for ``t``."""
        raise NotImplementedError

    def written(self, op: Any, tokens: tuple, reads: Iterable[Tensor] = ()) -> Entry:
        """A call on these tokens, which stand for the tensors ``reads`` among others."""
        raise NotImplementedError

    def token(self, a: Any) -> Any:
        """``a`` with tensors replaced by what stands for them."""
        if isinstance(a, Tensor):
            return self.value_of(a)
        if isinstance(a, (list, tuple)):
            return tuple([self.token(b) for b in a])
        if isinstance(a, dict):
            return {k: self.token(v) for k, v in a.items()}
        return a

    def tokens(self, op: Any, args: tuple) -> tuple:
        """The arguments of a call of ``op``, with what stands for tensors and for numbers that may differ."""
        info = op_info(op)
        if info.particular:
            if op in INDEXING:
                args = from_the_front(op, args)
            elif op in OFFSETS:
                args = self._relative(op, args)
            else:
                args = without_running_stats(op, args)
        tokens = tuple([self.token(a) for a in args])
        return (tokens[0], Number(float(args[1])), *tokens[2:]) if lifts(info, args) else tokens

    def starts_elsewhere(self, t: Tensor, offset: int) -> bool:
        """Whether ``offset``, counted from the start of the memory of ``t``, means another place in a later run."""
        raise NotImplementedError

    def _relative(self, op: Any, args: tuple) -> tuple:
        """The arguments of a call with an offset, left out where it is that of the operand itself."""
        t, offset = args[0], args[OFFSETS[op]] if len(args) > OFFSETS[op] else None
        if offset is None:
            return args
        if self.starts_elsewhere(t, offset):
            raise CaptureError(
                f"{op} with storage_offset={offset} on a tensor of shape {tuple(t.shape)}: the offset counts from the "
                "start of the memory that the tensor lies in, which may be another place when the step is run again. "
                "Leave storage_offset out (it is then that of the tensor), take a slice, or clone the tensor first"
            )
        return args[: OFFSETS[op]] if offset == t.storage_offset() else args

    def bind_outputs(self, entry: Entry, out: Any) -> None:
        """Let the outputs of ``entry`` stand for the tensors in ``out``."""
        if isinstance(out, Tensor):
            self.bind(out, Value(entry, None))
        elif isinstance(out, (list, tuple)):
            for i, o in enumerate(out):
                if isinstance(o, Tensor):
                    self.bind(o, Value(entry, i))

    def drop_out(self, args: tuple, result: Tensor, mask: Any) -> None:
        """Write down a dropout, given its ``mask``: x · mask / (1 − p)."""
        x, p = args[:2]
        kept = self.written(aten.mul.Tensor, (self.value_of(x), mask), (x,))
        scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
        self.bind(result, Value(self.written(aten.mul.Tensor, (Value(kept, None), scale)), None))
