"""What a recorder asks of the window that it serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ...ir.values import Epoch, Hold, Theta


class WriteGuard(Protocol):
    """Protects parameters, and what is held, from being overwritten."""

    def before_write(self, targets: list[Tensor], op: Any) -> list[int]:
        """``op`` is about to write into ``targets``; the ordinals of the parameters among them."""
        ...

    def after_write(self, hit: list[int]) -> None:
        """Parameters have been written into."""
        ...

    def preserve(self, targets: list[Tensor]) -> None:
        """Copy what is held of memory that is about to be overwritten."""
        ...

    def statistics(self, stats: Sequence[Tensor], training: bool) -> list[Tensor]:
        """What batch norm may overwrite in the place of its running statistics."""
        ...


class Guard(WriteGuard, Protocol):
    """Answers for the tape of a window.

    Attributes:
        epochs: the epochs of the super-step at hand, oldest first.
    """

    epochs: list[Epoch]

    def settle(self) -> None:
        """Put writes into parameters on the tape, before they are read again."""
        ...

    def enter(self, theta: Theta) -> None:
        """``theta`` is read for the first time."""
        ...

    def hold(self, tensor: Tensor) -> Hold:
        """The hold on a tensor that is read from outside."""
        ...

    def still_shown(self, tensor: Tensor) -> Theta | None:
        """The theta behind a tensor shown earlier, if its value is still that of now."""
        ...

    def was_read(self, tensor: Tensor) -> bool:
        """Whether a step has read ``tensor``."""
        ...

    def outlived(self, tensor: Tensor, steps: tuple[int, ...]) -> None:
        """``tensor``, which ``steps`` have read, outlives its recording."""
        ...

    def on_tape(self, storage: int) -> bool:
        """Whether the tape holds a piece of memory."""
        ...
