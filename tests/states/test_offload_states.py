"""What is offloaded comes back bit for bit, is kept once, and is what it was when it was handed over."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import metaoptim
from metaoptim.runtime.states.disk import Files, tier_for
from metaoptim.runtime.states.slots import Action, Advance, Keep, PullBack, Slots
from metaoptim.runtime.states.streams import coming, reverse, shrink, slide
from offloading import files, watch_writes


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every file that was written."""
    return watch_writes(monkeypatch)


def tier_of(tmp_path: Path, kind: str) -> Any:
    return tier_for("host" if kind == "host" else tmp_path)


def form(t: Any) -> Any:
    """What there is to a tensor: its bits, and how it has them."""
    if not isinstance(t, Tensor):
        return t
    plain = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    bits = plain.view(torch.uint8).tolist() if plain.numel() else []
    return t.dtype, t.shape, t.stride(), t.device, t.is_conj(), t.is_neg(), t.requires_grad, bits


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_states_come_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    tier = tier_of(tmp_path, kind)
    base = torch.randn(6, 8)
    base[0, 0], base[0, 1] = float("nan"), -0.0

    def state() -> list[Any]:
        memory = base.clone()
        return [
            None,
            memory,
            memory.t(),
            memory[2:5, 1::2],
            memory[5, 3],
            torch.get_rng_state(),
            torch.arange(5, dtype=torch.int32),
            torch.tensor([True, False]),
            torch.randn(3, dtype=torch.bfloat16),
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.randn(3, 1).expand(3, 4),
            torch.empty(0, 3),
            torch.randn(3, dtype=torch.complex128).conj(),
            torch.randn(3, dtype=torch.complex128).conj().imag,
            7,
        ]

    first = state()
    second = [*first[:5], *state()[5:]]
    forms = [[form(t) for t in s] for s in (first, second)]
    tier.save(3, first)
    tier.save(9, second)
    tier.settle()
    for alive in (True, False):  # at hand still, then to be read
        for position, expected in ((9, forms[1]), (3, forms[0])):
            got = tier.load(position)
            assert [form(t) for t in got] == expected
            where = {got[i].untyped_storage()._cdata for i in (1, 2, 3, 4)}
            assert len(where) == 1 and (got[1] is not first[1] if alive else True)
            del got
        if alive:
            del first, second
    tier.close()
    assert not list(tmp_path.iterdir())


def test_what_states_share_is_written_once_and_read_once(
    tmp_path: Path, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier: Any = tier_of(tmp_path, "disk")
    read: list[int] = []
    real = Files.read

    def count(self: Files, file: Any, number: int, into: Tensor) -> None:
        read.append(into.nbytes)
        real(self, file, number, into)

    monkeypatch.setattr(Files, "read", count)
    frozen, row = torch.randn(64), torch.randn(100, 8)[3]
    square = frozen.view(8, 8)
    for position in range(4):
        tier.save(position, [frozen, square, torch.full((16,), float(position)), row])
    tier.settle()
    assert written == [8 * (64 + 16 + 8), 128, 128, 128]  # of a larger tensor, what the state has of it
    value = frozen.clone()
    tier.forget([0])
    del frozen, square, row
    states = [tier.load(p) for p in (3, 2, 1)]
    assert sorted(read) == [64, 128, 128, 128, 512]
    assert all(s[0].data_ptr() == states[0][0].data_ptr() and torch.equal(s[0], value) for s in states)
    assert [float(s[2][0]) for s in states] == [3.0, 2.0, 1.0]
    assert len(files(tmp_path)) == 4  # the first has what the others share
    tier.forget([1, 2, 3])
    del states
    tier.close()
    assert not list(tmp_path.iterdir())


def test_memory_that_was_given_back_and_taken_again_is_not_taken_for_what_it_was(tmp_path: Path) -> None:
    tier: Any = tier_of(tmp_path, "disk")
    for position in range(50):
        tier.save(position, [torch.full((1000,), float(position))])
    for position in reversed(range(50)):
        assert float(tier.load(position)[0][0]) == position
    tier.close()


class Shelf(dict):
    """A tier that keeps what it is given."""

    save = dict.__setitem__
    load = dict.__getitem__

    def prefetch(self, position: int) -> None:
        assert position in self

    def forget(self, positions: list[int]) -> None:
        for position in positions:
            del self[position]

    def rest(self) -> None:
        pass


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), slots=st.integers(1, 5))
def test_sweeps_from_anywhere_to_anywhere(data: st.DataObject, slots: int) -> None:
    """Every state asked for is right, in the slots there are; a sweep of all there is replays no step twice."""
    store, end = Slots(slots, Shelf()), 0
    store.apply(Keep(0), [0])

    def carry_out(actions: Iterable[Action]) -> int:
        steps = 0
        for action in actions:
            if isinstance(action, Advance):
                (state,) = store[action.start]
                store.work[action.stop] = [state + action.stop - action.start]
                steps += action.stop - action.start
            elif isinstance(action, PullBack):
                assert store[action.position] == [action.position]
            else:
                store.apply(action, [end] if isinstance(action, Keep) and action.position == end else None)
            assert len(store) <= slots
        return steps

    for _ in range(data.draw(st.integers(1, 6))):
        for _ in range(data.draw(st.integers(1, 25))):
            carry_out(coming(store, end))
            end += 1
        top = data.draw(st.integers(store.base, end) | st.just(end))
        bottom = data.draw(st.integers(store.base, top) | st.just(store.base))
        steps = carry_out(reverse(store, ((p, p) for p in range(top - 1, bottom - 1, -1))))
        store.rest()
        assert steps <= top - store.base
        needed = data.draw(st.integers(store.base, end - 1))
        if data.draw(st.booleans()):  # as `Engine.trim` does
            near = store.nearest(needed)
            carry_out(slide(store, needed, end))
            base = store.base
            assert base in (near, needed) and store[base] == [base]
            assert min(store.far, default=base) >= base and not store.work
    assert all(store[p] == [p] for p in store.far)


def test_a_shrinking_number_of_slots(tmp_path: Path) -> None:
    tier = tier_of(tmp_path, "disk")
    store = Slots(None, tier)
    for position in range(30):
        state = [torch.full((2,), float(position))]
        for action in coming(store, position):
            store.apply(action, state)
        if position >= 5:
            for action in shrink(store, max(2, 12 - position)):
                store.apply(action)
            store.slots = max(2, 12 - position)
            assert len(store) <= max(2, 12 - position)
    for position in range(30):
        nearest = store.nearest(position)
        assert nearest <= position and float(store[nearest][0][0]) == nearest
    tier.close()


def test_sparse_states_are_refused(tmp_path: Path) -> None:
    with pytest.raises(metaoptim.StoreError, match="only dense tensors can be offloaded"):
        tier_of(tmp_path, "disk").save(0, [torch.eye(2).to_sparse()])
