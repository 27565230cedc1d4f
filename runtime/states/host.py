"""States in memory of the host, page-locked, for a device that has a memory of its own."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from torch import Tensor

from metaoptim.errors import StoreError

from .pieces import Piece
from .tier import Tier


class HostTier(Tier):
    """A lower tier in memory of the host.

    Copies are asked of the device's current stream, in order with what else is; the host does not wait for them.
    """

    kind = "host"

    def _put(self, parts: list[Tensor], copied: list[Any]) -> Future[Any]:
        kept: Future[Any] = Future()
        kept.set_result((list(parts), copied))
        return kept

    def _get(self, piece: Piece) -> tuple[Tensor, None]:
        assert piece.source is not None
        parts, copied = piece.source.result()
        for event in copied:
            event.synchronize()
        return parts[piece.number], None

    def _remove(self, piece: Piece) -> None:
        assert piece.source is not None
        piece.source.result()[0][piece.number] = None

    def _on_host(self, part: Tensor) -> Tensor:
        # what lies on the host anyway (a counter, say) may be changed there
        return part.clone() if part.device.type == "cpu" else super()._on_host(part)

    def _failed(self, error: BaseException, position: int, piece: Piece | None) -> StoreError:
        raise AssertionError("nothing is written behind the loop's back") from error

    def _end(self) -> None:
        pass
