"""The networks of a window while the function around it is captured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metaoptim.compiler.capture.symbolic.tracer import Tracer
from metaoptim.errors import CaptureError

from ..windows.networks import Networks


class FakeNetworks(Networks):
    """Networks that show fake parameters and buffers."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def _copy_buffers(self, modules: Sequence[nn.Module]) -> None:
        storages: dict[int, Tensor] = {}
        for module in (m for root in modules for m in root.modules() if id(m) not in self._modules):
            for name, b in module._buffers.items():
                if b is None or b.requires_grad or id(b) in self._copies:
                    continue
                if storages.setdefault(b.untyped_storage()._cdata, b) is not b:
                    raise CaptureError(
                        f"buffer {name!r} shares memory with another buffer; use an ordinary window"
                    )
                fake = self.tracer.faked(b).detach().clone(memory_format=torch.preserve_format)
                self.tracer.bind(fake, self.tracer.value_of(b))
                self._copies[id(b)] = fake
