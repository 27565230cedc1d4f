"""Schedules: which states of the inner loop to keep, and which to compute again; positions only, no tensors.

A sweep needs the states of T steps (the ``horizon``) in descending order, and has c ``slots`` for them, of which the
initial one takes one, and θ_T none. A state that is not kept is reached by running steps from the nearest kept one
below it, and on that way further states may be kept. All of it rests on one quantity, `advances`, and one rule,
`places`, of Revolve (A. Griewank, A. Walther, "Algorithm 799: Revolve", ACM TOMS 26, 2000): both are optimal, in closed
form.

Two situations:

* **From a kept state to a known target** (a sweep; a forward pass whose horizon is known): `places` says where to keep
  states on the way.
* **Forward, with the end unknown** (a window): `crowded_out` says, for each new state that finds the slots full, which
  one to give up. See there for how close to the optimum that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import comb


@lru_cache(maxsize=1 << 16)
def _repeats(states: int, slots: int) -> int:
    """The least r with states ≤ C(slots + r, slots): how often Revolve runs a step at most."""
    if slots == 1:
        return max(states - 1, 0)
    repeats, reach = 0, 1
    while reach < states:
        repeats += 1
        reach = reach * (slots + repeats) // repeats
    return repeats


@lru_cache(maxsize=1 << 16)
def advances(states: int, slots: int) -> int:
    """Fewest steps to run so that ``states`` consecutive states are at hand one after the other, the last one first.

    The first state is kept to begin with. With s slots (its own included) and the least r for which n ≤ C(s + r, s),
    the optimum is r·n − C(s + r, s + 1).
    """
    if states < 0 or slots < 1:
        raise ValueError(
            f"advances: got {states} states and {slots} slots, expected at least 0 states and at least 1 slot: the "
            "first state takes one"
        )
    repeats = _repeats(states, slots)
    return repeats * states - comb(slots + repeats, slots + 1)


def extra_forwards(horizon: int, slots: int) -> int:
    """Fewest steps to run a second time for a sweep over ``horizon`` steps, the horizon being known beforehand.

    The forward pass runs all T steps, since the outer loss reads θ_T, and keeps states on its way; then the sweep needs
    the states T − 1, …, 0. Seen from the start these are T + 1 states, the last one first, of which the T steps up to
    θ_T are the forward pass itself: ``advances(T + 1, c) − T``. (Holding state T − 1 besides the slots while the outer
    loss is computed would save r − 1 steps in all; that state is not held.)
    """
    return advances(horizon + 1, slots) - horizon


def tiered_forwards(horizon: int, slots: int) -> int:
    """Steps run a second time where every (c + 1)-th state goes to a lower tier: each once at most.

    Of a whole segment the c states after its beginning; those of the last one are in the slots, but for one state if it
    is whole.
    """
    return (slots - 1) * offloaded_states(horizon, slots) + horizon // (slots + 1)


def offloaded_states(horizon: int, slots: int) -> int:
    """How many states go to the tier then, besides the one that the loop begins with."""
    return max(horizon - 1, 0) // (slots + 1)


def with_tier(horizon: int, slots: int, choices: Sequence[int]) -> tuple[int, bool]:
    """How many slots to use, and whether with a lower tier, so that least work is done.

    Work is what is replayed and, with a tier, what is moved: a state that goes down and comes up counts as a step. It
    is T or a little less for any number of slots, by how many states of the last segment stay on the device; from
    about √(2T) slots on, these alone need no more. There can be ``slots``, 0 for none; ``choices`` are the numbers of
    them that there can be beside what a tier takes, ascending.
    """
    work = {c: tiered_forwards(horizon, c) + offloaded_states(horizon, c) for c in reversed(choices)}
    best = min(work, key=work.__getitem__, default=0)
    if slots and extra_forwards(horizon, slots) <= work.get(best, horizon):
        return slots, False
    return best, True


def places(start: int, target: int, slots: int) -> list[int]:
    """Where to keep states on the way from ``start`` to ``target`` that a sweep then goes back on.

    Every state from ``target`` down to ``start`` will be needed. Keeping these, and doing so again on every further way
    that the sweep has to go, takes ``advances(target − start + 1, slots)`` steps in all: ascending positions strictly
    between the two, fewer than ``slots``, of which ``start`` takes one and ``target`` none.
    """
    found: list[int] = []
    at = start
    while slots > 1 and at < target:
        # The next place splits the states left into a lower part, swept with all these slots, and an upper one, swept
        # before it with one less. Any split is optimal that lets the lower part be run at most r − 1 times more and
        # leaves the upper one at least what r − 1 times can reach; this is the highest of them.
        states = target - at + 1
        repeats = _repeats(states, slots)
        at += min(comb(slots + repeats - 1, slots), states - comb(slots + repeats - 2, slots - 1))
        slots -= 1
        if at < target:
            found.append(at)
    return found


def crowded_out(kept: Sequence[int], position: int, slots: int) -> int:
    """Which position to give up when one more state has been reached and every slot is taken.

    Given up is the one without which a sweep that began one step later would be cheapest, the lowest of several. A
    sweep from e over kept states p₀ < … < p_{k−1} costs Σ_i advances(p_{i+1} − p_i, c − i), with p_k = e: by the time
    it arrives at a segment, all slots above are free, and inside it proceeds as `places` says.

    While T ≤ (c + 1)(c + 2)/2 this takes no more than `extra_forwards`, for every T; no online scheme can beyond (the
    range is that of P. Stumm, A. Walther, "New algorithms for optimal online checkpointing", SIAM J. Sci. Comput. 32,
    2010). There it takes at most 1.22 times as much with 2 slots and at most 1.10 times with 3 or more, 1.02 times on
    average over T: enumerated for c ≤ 60, T ≤ 6,000. No scheme stays below 1.15 with 2 slots, or below 1.10 with 3.
    One slot leaves nothing to decide.

    ``kept`` are ascending positions of the kept states, as many as there are slots; the first, the initial one, stays.
    The result is ``position``, above them, if the new state is the one not to keep. Takes O(c) time.
    """
    if slots == 1:
        return position
    p = [*kept, position, position + 1]
    # Without p[j], the segment that begins at p[j - 1] reaches to p[j + 1] and is swept with slots - j + 1 slots. If it
    # is longer than these by one at most, giving up p[j] costs a single step, which is the least there is; and the
    # lowest such j leaves most slots to the segments above. While T is small this spares the sums below.
    for j in range(1, slots + 1):
        once = slots - j + 2
        if p[j + 1] - p[j - 1] <= once:
            return p[j]
        if p[j] - p[j - 1] > once:
            break
    below = list(accumulate((advances(p[i + 1] - p[i], slots - i) for i in range(slots - 1)), initial=0))
    above, best, least = 0, slots, -1
    for j in range(slots, 0, -1):
        cost = below[j - 1] + advances(p[j + 1] - p[j - 1], slots - j + 1) + above
        if least < 0 or cost <= least:
            best, least = j, cost
        above += advances(p[j + 1] - p[j], slots - j + 1)
    return p[best]
