"""Random numbers of compiled steps and functions: drawn as eager draws them, and again alike, whoever draws besides."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from metaoptim.compiler.ir.values import Noise
from metaoptim.runtime.engine import noise

Draw = Callable[[Tensor], Tensor]

# What gives random numbers like h, of shape (4, 2).
DRAWS: dict[str, Draw] = {
    "rand": lambda h: torch.rand(4, 2),
    "rand in single precision": lambda h: torch.rand(4, 2, dtype=torch.float32).double(),
    "randn": lambda h: torch.randn(4, 2),
    "many": lambda h: torch.randn(40, 20).sum(0)[:8].view(4, 2),
    "randint": lambda h: torch.randint(5, (4, 2)).double(),
    "randint from": lambda h: torch.randint(-3, 5, (4, 2)).double(),
    "randperm": lambda h: torch.randperm(8).view(4, 2).double(),
    "rand_like": lambda h: torch.rand_like(h),
    "randn_like, transposed": lambda h: torch.randn_like(h.t()).t(),
    "randn_like, of another type": lambda h: torch.randn_like(h, dtype=torch.float32).double(),
    "randint_like": lambda h: torch.randint_like(h, 7),
    "randint_like from": lambda h: torch.randint_like(h, -3, 7),
    "dropout": lambda h: F.dropout(torch.ones_like(h), 0.3),
    "native_dropout": lambda h: torch.native_dropout(torch.ones_like(h), 0.3, True)[0],
    "uniform_": lambda h: torch.empty(4, 2).uniform_(-1, 3),
    "normal_, transposed": lambda h: torch.empty(2, 4).t().normal_(1, 2),
    "random_": lambda h: torch.empty(4, 2, dtype=torch.int8).random_().double(),
    "random_ to": lambda h: torch.empty(4, 2).random_(9),
    "random_ from": lambda h: torch.empty(4, 2).random_(3, 9),
    "exponential_": lambda h: torch.empty(4, 2).exponential_(2.0),
    "geometric_": lambda h: torch.empty(4, 2).geometric_(0.3),
    "cauchy_": lambda h: torch.empty(4, 2).cauchy_().clamp(-3, 3),
    "log_normal_": lambda h: torch.empty(4, 2).log_normal_(),
    "bernoulli_": lambda h: torch.empty(4, 2).bernoulli_(0.4),
    "normal of numbers": lambda h: torch.normal(1.0, 2.0, (4, 2)),
    "normal of tensors": lambda h: torch.normal(torch.ones(4, 2), torch.full((4, 2), 0.5)),
    "bernoulli": lambda h: torch.bernoulli(h.sigmoid()),
    "bernoulli of many": lambda h: torch.bernoulli(h.sigmoid().repeat(50, 3)).view(-1, 4, 2).mean(0),
    "bernoulli of single precision": lambda h: h.float().sigmoid().bernoulli().double(),
    "bernoulli of half precision": lambda h: h.bfloat16().sigmoid().bernoulli().double(),
    "bernoulli_ by a tensor": lambda h: torch.empty(4, 2).bernoulli_(h[0].sigmoid()),
    "multinomial": lambda h: h.softmax(1).multinomial(1).double().expand(4, 2),
    "multinomial, several": lambda h: h.view(-1).softmax(0).multinomial(8).double().view(4, 2),
    "multinomial with replacement": lambda h: h.softmax(1).multinomial(2, replacement=True).double(),
    "bernoulli's distribution": lambda h: torch.distributions.Bernoulli(logits=h).sample(),
    "categorical distribution": lambda h: torch.distributions.Categorical(logits=h).sample((2,)).double().t(),
    "several": lambda h: F.dropout(torch.rand(4, 2), 0.3) + torch.randn_like(h),
}


class Loop:
    """Inner steps that draw random numbers, in one of the three forms.

    Attributes:
        left: gradients, and the random numbers of the steps, when it has run.
    """

    def __init__(self, draw: Draw, steps: int = 6, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.draw, self.steps = draw, steps
        self.net = nn.Linear(3, 2)
        with torch.no_grad():
            for p in self.net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.lr, self.x = torch.tensor(0.01, requires_grad=True), torch.randn(4, 3, generator=generator)
        self.left: list[Tensor] = []

    def step(self, inner: Any, x: Tensor) -> Tensor:
        h = self.net(x)
        drawn = self.draw(h.detach())
        inner.step((h * drawn).sin().square().mean())
        return drawn.detach().clone()

    def window(self, inner: Any, step: Callable, **options: Any) -> tuple[Tensor, list[Tensor]]:
        with metaoptim.SlidingWindow(offline=True, **options):
            drawn = [step(inner, self.x) for _ in range(self.steps)]
            return self.net(self.x).square().mean(), drawn

    def run(self, form: str, options: dict[str, Any]) -> list[Tensor]:
        """Form A without options, B or C."""

        def whole(net: nn.Module, lr: Tensor) -> tuple[Tensor, list[Tensor]]:
            return self.window(metaoptim.MetaSGD([net], lr=lr), self.step, **options)

        if form == "C":
            loss, drawn = metaoptim.compile(whole, backend="eager")(self.net, self.lr)
        else:
            inner = metaoptim.MetaSGD([self.net], lr=self.lr)
            step = metaoptim.compile(lambda x: self.step(inner, x), backend="eager")
            loss, drawn = self.window(
                inner, self.step if form == "A" else lambda inner, x: step(x), **options
            )
        loss.backward()
        self.left = [*self.gradients(), *drawn]
        return self.left

    def gradients(self) -> list[Tensor]:
        return [t.grad for t in (self.lr, *self.net.parameters()) if t.grad is not None]

    def check(self) -> None:
        """Compare the gradients with a full tape's on the numbers that were drawn."""
        drawn = iter(self.left[3:])
        tape = Loop(lambda h: next(drawn), self.steps)
        tape.net, tape.x = self.net, self.x
        lr, found = self.lr, self.gradients()
        tape.lr = lr.detach().clone().requires_grad_()
        self.net.zero_grad()
        tape.run("A", {"strategy": "full_tape"})
        assert all(bool(g.any()) for g in tape.gradients())
        agree(found, tape.gradients())


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) and float(expected[0].abs()) > 1e-6
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-14)


FORMS = pytest.mark.parametrize("form", ["B", "C"])


@FORMS
@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_is_what_eager_draws(name: str, form: str) -> None:
    """From the same seed, with states given up, and the generator ends where it would have without us."""
    torch.manual_seed(7)
    expected = Loop(DRAWS[name]).run("A", {"strategy": "full_tape"})
    after = torch.get_rng_state()
    torch.manual_seed(7)
    agree(Loop(DRAWS[name]).run(form, {"slots": 2}), expected)
    assert torch.equal(torch.get_rng_state(), after)


@FORMS
@pytest.mark.parametrize("options", [{}, {"slots": 2}, {"memory_budget": 60_000}], ids=str)
def test_draws_of_another_thread_in_the_midst_of_ours_change_nothing(
    form: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, disturbed = noise.drawn, []

    def drawn(of: Noise, generator: torch.Generator) -> Tensor:
        other = threading.Thread(target=lambda: disturbed.append(torch.rand(3)))
        other.start()
        other.join()
        return original(of, generator)

    monkeypatch.setattr(noise, "drawn", drawn)
    loop = Loop(DRAWS["several"])
    loop.run(form, options)
    assert len(disturbed) >= 2 * 3 * 6  # also when they were drawn again
    loop.check()


@FORMS
@pytest.mark.parametrize("options", [{}, {"slots": 2}], ids=str)
def test_draws_between_steps_are_not_drawn_twice(form: str, options: dict[str, Any]) -> None:
    """Whoever draws between two steps has numbers of his own; what was drawn then is drawn again by a replay."""
    torch.manual_seed(7)
    own: list[float] = []
    loop = Loop(lambda h: torch.rand(4, 2))
    if form == "B":
        window = loop.window

        def drawing(inner: Any, step: Callable, **options: Any) -> Any:
            def then_draw(inner: Any, x: Tensor) -> Tensor:
                found = step(inner, x)
                own.extend(torch.rand(2).tolist())
                return found

            return window(inner, then_draw, **options)

        loop.window = drawing  # type: ignore[method-assign]
        loop.run(form, options)
    else:
        with metaoptim.progress(lambda done, total: own.extend(torch.rand(2).tolist())):
            loop.run(form, options)
    numbers = [*own, *torch.cat(loop.left[3:]).flatten().tolist()]
    assert len(own) >= 12 and len({*numbers}) == len(numbers)
    loop.check()


@FORMS
def test_two_threads_that_draw_at_a_time(form: str) -> None:
    """Also: each captures its own function while the other captures or draws, and no two are given the same numbers."""
    patched = torch.manual_seed, torch.Tensor.numpy, random.random, np.random.rand
    validate = torch.distributions.Distribution._validate_args
    loops = [Loop(lambda h: torch.randn(4, 2), 30, seed) for seed in range(2)]
    begin, failed = threading.Barrier(2), []

    def work(loop: Loop) -> None:
        begin.wait(60)
        try:
            loop.run(form, {"slots": 3})
        except Exception as error:
            failed.append(error)

    for _ in range(2):
        for loop in loops:
            loop.lr.grad = None
            loop.net.zero_grad()
        threads = [threading.Thread(target=work, args=(loop,)) for loop in loops]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        numbers = [x for loop in loops for x in torch.cat(loop.left[3:]).flatten().tolist()]
        assert len({*numbers}) == len(numbers) == 2 * 30 * 8
    for loop in loops:
        loop.check()
    assert patched == (torch.manual_seed, torch.Tensor.numpy, random.random, np.random.rand)
    assert torch.distributions.Distribution._validate_args is validate
    compiled: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        compiled.append(module.code)
        return module.forward

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of dynamo's own imports
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert compiled, "torch.compile compiles as before"


# -- captures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act",
    [lambda: random.random(), lambda: np.random.rand(), lambda: torch.rand(3)],
    ids=["python", "numpy", "torch"],
)
def test_what_another_thread_draws_is_none_of_a_captures_business(act: Callable) -> None:
    def draw(h: Tensor) -> Tensor:
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
        return torch.ones(4, 2)

    loop = Loop(draw)
    loop.run("C", {})
    loop.check()


@pytest.mark.parametrize("alone", [True, False])
def test_a_generator_that_has_moved_behind_our_back(alone: bool) -> None:
    """By a function whose name was imported before: with other threads alive, the message leaves open who it was."""
    early = random.random
    done = threading.Event()
    other = threading.Thread(target=done.wait, args=(60,))
    if not alone:
        other.start()
    others = threading.active_count() - 1
    match = "by the function or by another thread" if others else "random numbers of Python"
    try:
        with pytest.raises(metaoptim.CaptureError, match=match):
            Loop(lambda h: h * early()).run("C", {})
    finally:
        done.set()
        if not alone:
            other.join()


def test_a_generator_seeded_behind_our_back() -> None:
    def draw(h: Tensor) -> Tensor:
        torch.default_generator.manual_seed(random_seed)
        return h

    random_seed = torch.initial_seed() + 1
    with pytest.raises(metaoptim.CaptureError, match="seeded"):
        Loop(draw).run("C", {})
