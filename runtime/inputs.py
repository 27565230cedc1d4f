"""What a step read from outside: held by reference and watched, or copied where it is meant to change."""

from __future__ import annotations

import torch
from torch import Tensor

from metaoptim.errors import StaleInputError

_CHUNK = 1 << 16
_weights: Tensor | None = None


def checksum(t: Tensor) -> int | Tensor | None:
    """A position-dependent 32-bit digest of the bytes of ``t`` (a tensor, unsynchronised, off the CPU).

    Version counters do not move for ``.data`` writes, memory shared with numpy and fused optimizers; bytes do.
    """
    if t.layout is not torch.strided:
        return t._version
    with torch.no_grad():
        if t.device.type != "cpu":
            return torch.hash_tensor(t)
        if t.is_complex():
            t = torch.view_as_real(t)
        flat = t.detach().contiguous()
        flat = flat.as_strided((flat.numel(),), (1,))
        width = flat.element_size()
        if width >= 4:
            flat = flat.view(torch.int32)
        else:
            flat = flat.view(torch.int16 if width == 2 else torch.uint8).to(torch.int32)
        weights = _mixing_weights()
        n = flat.numel()
        whole = n // _CHUNK
        digest = int(torch.dot(flat[whole * _CHUNK :], weights[: n - whole * _CHUNK]))
        if whole:
            rows = torch.mv(flat[: whole * _CHUNK].view(whole, _CHUNK), weights)
            digest = hash((digest, tuple(rows.tolist())))
        return digest


def _mixing_weights() -> Tensor:
    global _weights
    if _weights is None:
        generator = torch.Generator().manual_seed(0x5EED)
        _weights = torch.randint(-(2**31), 2**31 - 1, (_CHUNK,), dtype=torch.int32, generator=generator) | 1
    return _weights


class Held:
    """An input of a recorded step."""

    __slots__ = ("tensor", "digest", "label")

    def __init__(self, tensor: Tensor, digest: int | Tensor | None, label: str) -> None:
        self.tensor, self.digest, self.label = tensor, digest, label

    def get(self) -> Tensor:
        """The tensor, or `StaleInputError` if it was overwritten since."""
        if self.digest is not None:
            now = checksum(self.tensor)
            same = bool((now == self.digest).all()) if isinstance(now, Tensor) else now == self.digest
            if not same:
                raise StaleInputError(
                    f"{self.label}, a tensor of shape {tuple(self.tensor.shape)}, was overwritten after the step had "
                    "read it, so the step cannot be differentiated any more. Give each step a tensor of its own (clone "
                    "what is reused), or call backward before overwriting it."
                )
        return self.tensor


class Snapshots:
    """Copies of inputs that are expected to change (meta-parameters, buffers), one copy per value."""

    def __init__(self) -> None:
        self._taken: dict[int, tuple[Tensor, int | Tensor | None, int, Held]] = {}

    def take(self, tensor: Tensor, label: str) -> Held:
        """A private copy of ``tensor`` as it is now; the last one if nothing changed."""
        digest, version = checksum(tensor), 0 if tensor.is_inference() else tensor._version
        known = self._taken.get(id(tensor))
        if known is not None and known[0] is tensor:
            if isinstance(digest, Tensor):
                same = version == known[2]
                held = Held(
                    known[3].tensor, digest, label
                )  # compared when it is used: no synchronisation here
            else:
                same, held = digest == known[1], known[3]
            if same:
                return held
        with torch.no_grad():
            held = Held(tensor.detach().clone(), None, label)
        self._taken[id(tensor)] = (tensor, digest, version, held)
        return held

    def forget(self, tensor: Tensor) -> None:
        """Drop the last copy of ``tensor``."""
        self._taken.pop(id(tensor), None)

    def clear(self) -> None:
        """Drop every reference to the user's tensors."""
        self._taken.clear()
