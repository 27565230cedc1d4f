"""Episodes: small classification tasks drawn from many characters."""

from __future__ import annotations

from typing import NamedTuple

import torch

from glyphs import Characters


class Episode(NamedTuple):
    """One N-way K-shot task.

    Attributes:
        x_spt: support images (ways * shots, 1, 28, 28), strokes at 1.
        y_spt: support labels, the position of the character in `characters`.
        x_qry: query images (ways * queries, 1, 28, 28).
        y_qry: query labels.
        characters: row of each of the characters in the set they were drawn from.
    """

    x_spt: torch.Tensor
    y_spt: torch.Tensor
    x_qry: torch.Tensor
    y_qry: torch.Tensor
    characters: list[int]


class EpisodeSampler:
    """Draws episodes; support and query images of a character never coincide.

    Args:
        characters: what to draw from.
        ways: characters per episode.
        shots: support images per character.
        queries: query images per character.
        seed: seed of the sampler's own generator.
        device: where the episodes live.
        rotate: also turn each character by a random number of quarter turns, which
            makes four classes of one (usual for meta-training on Omniglot).
    """

    def __init__(
        self,
        characters: Characters,
        ways: int,
        shots: int,
        queries: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        rotate: bool = False,
    ):
        count, per_character = characters.images.shape[:2]
        if ways > count:
            raise ValueError(f"{ways} ways, but there are only {count} characters")
        if shots + queries > per_character:
            raise ValueError(
                f"{shots} shots and {queries} queries, but a character has only {per_character} images"
            )
        self._images = torch.from_numpy(characters.images).to(device)
        self._ways, self._shots, self._queries, self._rotate = ways, shots, queries, rotate
        # Indices are drawn on the CPU: the same seed gives the same episodes on any device.
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Episode:
        """Returns the next episode."""
        count, per_character = self._images.shape[:2]
        drawn = self._shots + self._queries
        rows = torch.randperm(count, generator=self._generator)[: self._ways]
        columns = torch.rand(self._ways, per_character, generator=self._generator).argsort(1)[:, :drawn]
        images = self._images[rows[:, None], columns].float() / 255
        if self._rotate:
            turns = torch.randint(4, (self._ways,), generator=self._generator).tolist()
            images = torch.stack([torch.rot90(image, k, (1, 2)) for image, k in zip(images, turns)])
        labels = torch.arange(self._ways, device=images.device)
        support, query = images.split([self._shots, self._queries], dim=1)
        support, query = support.contiguous(), query.contiguous()  # one layout, whatever the draw
        return Episode(
            support.flatten(0, 1).unsqueeze(1),
            labels.repeat_interleave(self._shots),
            query.flatten(0, 1).unsqueeze(1),
            labels.repeat_interleave(self._queries),
            rows.tolist(),
        )

    def state(self) -> torch.Tensor:
        """Returns the state of the generator, for a checkpoint."""
        return self._generator.get_state()

    def restore(self, state: torch.Tensor) -> None:
        """Continues from a state that `state()` returned."""
        self._generator.set_state(state)
