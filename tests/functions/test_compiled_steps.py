"""A compiled inner step inside an ordinary window (form B) against the ordinary window (form A) and the full tape."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaoptim
from problems import NETWORKS, data

Wrap = Callable[[Callable], Callable]
MODES = pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
XS, YS = data(6)

# Faking a tensor that is no leaf reads its .grad.


def compiled(fn: Callable) -> Callable:
    return metaoptim.compile(fn, backend="eager")


def plain(fn: Callable) -> Callable:
    return fn


# -- against forms A and full tape, by everything that is left ---------------------------------------------------------


class Bench:
    """A network, an optimizer, two meta-parameters, and what a run of them has left.

    Attributes:
        wrap: what makes a step of a function.
        found: results that a run wants compared.
    """

    def __init__(
        self, wrap: Wrap, network: str = "linear", optimizer: str = "MetaAdam", **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.wrap, self.net = wrap, NETWORKS[network]()
        self.log_lr = torch.tensor(-2.5, requires_grad=True)
        self.weight = torch.tensor(0.3, requires_grad=True)
        self.inner = getattr(metaoptim, optimizer)([self.net], lr=0.05, **options)
        self.found: list[Tensor] = []
        torch.manual_seed(4)

    def step(self) -> Callable:
        """The ordinary step: weighted regression."""
        net, inner, weight = self.net, self.inner, self.weight

        def step(x: Tensor, y: Tensor) -> None:
            inner.step(F.mse_loss(net(x), y) * weight.sigmoid())

        return self.wrap(step)

    def outer(self) -> Tensor:
        return F.mse_loss(self.net(XS[6]), YS[6])

    def left(self, *more: Any) -> list[Tensor | None]:
        """Gradients, parameters, buffers, optimizer state, what was found, and where the random stream is."""
        nets, inners = [self.net, *more[::2]], [self.inner, *more[1::2]]
        params = [p for net in nets for p in net.parameters()]
        left = [p.grad for p in params] + [self.log_lr.grad, self.weight.grad]
        left += params + [b.double() for net in nets for b in net.buffers()] + self.found
        left += [v.double() for o in inners for s in o.state.values() for v in s.values()]
        return [*left, torch.rand(3)]


def same(run: Callable[..., list[Tensor | None]], **window: Any) -> None:
    """``run(wrap, **window)`` leaves the same with compiled steps as with ordinary ones and with the full tape."""
    tape = run(plain, strategy="full_tape", **window)
    assert any(v is not None and bool(v.any()) for v in tape), "nothing has a gradient, by the tape too"
    for got in (run(plain, **window), run(compiled, **window), run(compiled, slots=2, **window)):
        assert len(got) == len(tape)
        for k, (g, e) in enumerate(zip(got, tape, strict=True)):
            assert (g is None) == (e is None), f"entry {k}: got {g}, expected {e}"
            if e is not None:
                torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-14, msg=lambda m, k=k: f"entry {k}: {m}")


@MODES
def test_actor_and_critic_in_one_step(offline: bool) -> None:
    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap)
        actor, actor_optim, weight = b.net, b.inner, b.weight
        critic = nn.Linear(3, 1)
        critic_optim = metaoptim.MetaSGD([critic], lr=0.03, momentum=0.9)

        def losses(x: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
            returns = reward * weight.sigmoid()
            values = critic(x).squeeze(-1)
            policy = actor(x).log_softmax(-1)[:, 0]
            return (values - returns).square().mean(), -(policy * (returns - values.detach())).mean()

        @wrap
        def step(x: Tensor, reward: Tensor) -> None:
            critic_loss, actor_loss = losses(x, reward)
            critic_optim.step(critic_loss)
            actor_optim.step(actor_loss)

        actor_optim.param_groups[0]["lr"] = b.log_lr.exp()
        with metaoptim.SlidingWindow(**window):
            for t in range(4):
                step(XS[t], YS[t, :, 0])
            sum(losses(XS[6], YS[6, :, 0])).backward()
        return b.left(critic, critic_optim)

    same(run, offline=offline)


@MODES
@pytest.mark.parametrize("network", ["conv_bn", "dropout"])
def test_ordinary_and_compiled_steps_take_turns(network: str, offline: bool) -> None:
    """Also: buffers, and the random stream, which the compiled step draws from like the ordinary one."""

    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap, network, "MetaSGD", momentum=0.8)
        steps = [b.step(), Bench.step(_with(b, plain))]
        b.inner.param_groups[0]["lr"] = b.log_lr.exp()
        outer = 0.0
        with metaoptim.SlidingWindow(**window):
            for t in range(5):
                outer = outer + b.outer()  # batch norm lets autograd save its statistics here
                steps[t % 2](XS[t], YS[t])
                b.found.append(torch.rand(2))
            (outer + b.outer()).backward()
        return b.left()

    same(run, offline=offline)


def _with(bench: Bench, wrap: Wrap) -> Bench:
    other = object.__new__(Bench)
    other.__dict__ = {**bench.__dict__, "wrap": wrap}
    return other


@MODES
def test_results_in_the_outer_loss_and_in_later_steps(offline: bool) -> None:
    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap, optimizer="MetaSGD", momentum=0.9)
        net, inner, weight = b.net, b.inner, b.weight

        @wrap
        def step(x: Tensor, y: Tensor, h: Tensor) -> dict[str, Any]:
            out = net(x)
            loss = F.mse_loss(out, y) * weight + 0.1 * (h * out).sum()
            inner.step(loss)
            return {
                "loss": loss,
                "h": out.tanh(),
                "after": net(x).mean(),
                "seen": out.detach(),
                "name": "step",
            }

        inner.param_groups[0]["lr"] = b.log_lr.exp()
        h, total = torch.zeros(5, 2), 0.0
        with metaoptim.SlidingWindow(**window):
            for t in range(4):
                result = step(XS[t], YS[t], h)
                h = result["h"] * 0.9
                total = total + (t + 1) * result["loss"] + result["after"]
                b.found.append(result["seen"])
                inner.step(F.mse_loss(net(XS[t]), result["h"]))  # an ordinary step takes them too
                assert result["name"] == "step" and not result["seen"].requires_grad
            outer = total + h.square().sum() + b.outer()
        b.found += torch.autograd.grad(total, [b.log_lr, weight], retain_graph=True)
        outer.backward()  # after the block, and for the second time
        return b.left()

    same(run, offline=offline)


@MODES
def test_state_is_carried_over_windows(offline: bool) -> None:
    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap)
        step = b.step()
        for k in range(3):
            b.inner.param_groups[0]["lr"] = (b.log_lr + 0.1 * k).exp()
            with metaoptim.SlidingWindow(**window):
                for t in range(2):
                    step(XS[t + k], YS[t + k])
                b.outer().backward()
        if wrap is compiled:  # the first step creates state; offline it does so in every window
            assert count(step) == 2
        return b.left()

    same(run, offline=offline)


def count(step: Any) -> int:
    """How many distinct step graphs a compiled step holds."""
    return len({id(program.step.step) for found in step._specializations.known.values() for program in found})


def test_another_shape_or_mode_is_compiled_anew() -> None:
    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap, "conv_bn", "MetaSGD")
        step = b.step()
        with metaoptim.SlidingWindow(**window):
            for t, (rows, training) in enumerate(
                [(5, True), (4, True), (5, True), (4, False), (4, True), (5, True)]
            ):
                b.net.train(training)
                step(XS[t][:rows], YS[t][:rows])
            b.outer().backward()
        if wrap is compiled:
            assert count(step) == 3
        return b.left()

    same(run, offline=True)


@MODES
def test_several_inner_steps_in_one_call(offline: bool) -> None:
    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap, "dropout", "MetaSGD", momentum=0.9)
        net, inner, weight = b.net, b.inner, b.weight

        @wrap
        def step(x: Tensor, y: Tensor) -> Tensor:
            for _ in range(3):
                inner.step(F.mse_loss(net(x + 0.1 * torch.randn_like(x)), y) * weight)
            return torch.rand(2)

        with metaoptim.SlidingWindow(**window):
            for t in range(3):
                b.found.append(step(XS[t], YS[t]))
            b.outer().backward()
        return b.left()

    same(run, offline=offline)


@pytest.mark.parametrize("first_order", [False, True])
def test_backward_hook_and_first_order(first_order: bool) -> None:
    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap, optimizer="MetaSGD", momentum=0.9, first_order=first_order)
        b.inner.reset_grad_normalizer(0.2)
        step = b.step()
        with metaoptim.SlidingWindow(backward_hook=lambda grad: 0.5 * grad, **window):
            for t in range(4):
                step(XS[t], YS[t])
            b.outer().backward()
        return b.left()

    same(run, offline=True)
    with_hook = run(compiled, offline=True)[0]
    assert not torch.allclose(with_hook, Bench(plain).net[0].weight)


def test_a_window_that_asks_for_the_first_order_has_it() -> None:
    def run(wrap: Wrap, gradient: str | None = "first_order", **window: Any) -> list[Tensor | None]:
        b = Bench(wrap)
        step, given = b.step(), {} if gradient is None else {"gradient": gradient}
        for options in ({}, given):  # the step of an exact window is another one
            for p in (*b.net.parameters(), b.log_lr, b.weight):
                p.grad = None
            with metaoptim.SlidingWindow(**options, **window):
                for t in range(4):
                    step(XS[t], YS[t])
                b.outer().backward()
        return b.left()

    same(run, offline=True)
    assert not torch.allclose(run(compiled, offline=True)[0], run(compiled, None, offline=True)[0])


@MODES
def test_writes_into_parameters_cut_the_history(offline: bool) -> None:
    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap, optimizer="MetaSGD")
        step = b.step()
        with metaoptim.SlidingWindow(**window):
            for t in range(4):
                step(XS[t], YS[t])
                if t == 1:
                    with torch.no_grad():
                        b.net[0].weight.mul_(0.5)
            b.outer().backward()
        return b.left()

    same(run, offline=offline)


@MODES
def test_the_initial_parameter_known_from_before_is_a_constant(offline: bool) -> None:
    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap, optimizer="MetaSGD")
        net, inner, start = b.net, b.inner, b.net[0].weight

        @wrap
        def step(x: Tensor, y: Tensor) -> None:
            inner.step(F.mse_loss(net(x), y) + 0.3 * (net[0].weight - start).square().sum())

        with metaoptim.SlidingWindow(**window):
            for t in range(3):
                step(XS[t], YS[t])
            b.outer().backward()
        return b.left()

    same(run, offline=offline)


# -- faults ------------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("network", ["conv_bn", "dropout"])
def test_after_an_exception_all_is_as_at_entry(network: str, offline: bool) -> None:
    b = Bench(plain, network)
    net, inner, weight = b.net, b.inner, b.weight

    @compiled
    def step(x: Tensor, y: Tensor) -> None:
        inner.step(F.mse_loss(net(x), y) * weight)
        if x.shape[0] < 5:
            raise KeyError("in the middle of a capture")

    b.outer().backward()
    before = [None if v is None else v.detach().clone() for v in b.left()[:-1]]
    for moment in (0, 2):
        with pytest.raises(KeyError, match="capture"):
            with metaoptim.SlidingWindow(offline=offline):
                for t in range(3):
                    rows = 4 if t == moment else 5
                    step(XS[t][:rows], YS[t][:rows])
        assert not inner.state
        for now, then in zip(b.left()[:-1], before, strict=True):
            assert now is then or torch.equal(now, then)


@MODES
def test_a_step_that_failed_is_as_if_never_called(offline: bool) -> None:
    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap, "dropout", "MetaSGD", momentum=0.9)
        net, inner, weight = b.net, b.inner, b.weight

        @wrap
        def step(x: Tensor, y: Tensor) -> None:
            if x.shape[0] < 5:
                raise KeyError("no")
            inner.step(F.mse_loss(net(x), y) * weight)

        with metaoptim.SlidingWindow(**window):
            for t in range(3):
                with pytest.raises(KeyError, match="no"):
                    step(XS[t][:4], YS[t][:4])
                step(XS[t], YS[t])
            b.outer().backward()
        return b.left()

    same(run, offline=offline)


def test_values_and_options_that_a_compiled_step_cannot_have() -> None:
    b = Bench(plain)
    net, inner = b.net, b.inner

    @compiled
    def logs(x: Tensor, y: Tensor) -> float:
        loss = F.mse_loss(net(x), y)
        inner.step(loss)
        return loss.item()

    with pytest.raises(metaoptim.errors.CaptureError, match=r"item\(\)(.|\n)*test_compiled_steps.py"):
        with metaoptim.SlidingWindow():
            logs(XS[0], YS[0])
    step = Bench.step(_with(b, compiled))
    for options in ({"record_grad_tape": True}, {"pickup_step": 0}):
        with pytest.raises(metaoptim.errors.CaptureError, match="record_grad_tape or pickup_step"):
            with metaoptim.SlidingWindow(**options):
                step(XS[0], YS[0])


@MODES
@pytest.mark.parametrize("where", ["computed outside", "a result"])
def test_arguments_that_depend_on_the_parameters_are_refused(where: str, offline: bool) -> None:
    """The ordinary step takes the inner gradient through them; detached ones, and those of earlier steps, are fine."""
    b = Bench(plain, optimizer="MetaSGD")
    net, inner = b.net, b.inner

    @compiled
    def step(x: Tensor, y: Tensor) -> Tensor:
        inner.step(F.mse_loss(net(x), y))
        return net(x).tanh()

    with metaoptim.SlidingWindow(offline=offline):
        early = net(XS[4])
        y = step(XS[0], YS[0])
        given = net(XS[4]).tanh() if where == "computed outside" else 2 * y
        with pytest.raises(metaoptim.errors.CaptureError, match="would miss that path"):
            step(XS[1], given)
        step(XS[1], given.detach())
        step(XS[2], given)  # parameters have moved on: by now it is carried
        step(XS[2], early)
        inner.param_groups[0]["lr"] = 0.1 * net[0].weight.square().mean()  # reaches no inner loss
        step(XS[3], YS[3])
        b.outer().backward()


@pytest.mark.parametrize("change", ["state", "lr", "learnt lr", "training", "clipping"])
def test_changes_behind_an_object(change: str) -> None:
    class Agent:
        pass

    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap, "conv_bn", "MetaAdam" if change == "state" else "MetaSGD")
        agent: Any = Agent()
        agent.net, agent.inner = b.net, b.inner
        agent.inner.param_groups[0]["lr"] = b.log_lr.exp() if change == "learnt lr" else 0.1

        @wrap
        def step(x: Tensor, y: Tensor) -> None:
            agent.inner.step(F.mse_loss(agent.net(x), y))

        with metaoptim.SlidingWindow(**window):
            for t in range(2):
                step(XS[t], YS[t])
            if change == "lr":
                agent.inner.param_groups[0]["lr"] = 0.2
            elif change == "learnt lr":
                agent.inner.param_groups[0]["lr"] = 2 * b.log_lr.exp()
            elif change == "training":
                agent.net.eval()
            elif change == "clipping":
                agent.inner.reset_grad_normalizer(0.01)
            step(XS[2], YS[2])
            b.outer().backward()
        return b.left()

    same(run, offline=True)


def test_buffers_behind_an_object_are_those_of_the_window() -> None:
    class Agent:
        pass

    def run(wrap: Wrap, **window: Any) -> list[Tensor | None]:
        b = Bench(wrap, "conv_bn", "MetaSGD")
        agent: Any = Agent()
        agent.net, agent.inner, weight = b.net, b.inner, b.weight

        @wrap
        def step(x: Tensor, y: Tensor) -> None:
            agent.inner.step(F.mse_loss(agent.net(x), y) * weight)

        for _ in range(2):
            with metaoptim.SlidingWindow(**window):
                for t in range(2):
                    step(XS[t], YS[t])
                b.outer().backward()
        return b.left()

    same(run, offline=False)


def test_a_compiled_step_does_not_keep_its_first_window() -> None:
    b = Bench(plain, optimizer="MetaSGD")
    net, inner = b.net, b.inner

    @compiled
    def step(x: Tensor, y: Tensor, h: Tensor) -> Tensor:
        out = net(x)
        inner.step(F.mse_loss(out, y + h))
        return out

    window = metaoptim.SlidingWindow()
    with window:
        h = step(XS[0], YS[0], torch.zeros(5, 2))
        h = step(XS[1], YS[1], h)
        engine = weakref.ref(window._session.engine)
    del window, h
    gc.collect()
    assert engine() is None


def test_an_lstm_is_captured_once_for_its_steps(caplog: pytest.LogCaptureFixture) -> None:
    """It keeps lists of its parameters, which are others in each step of a window."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    def gradient(wrap: Callable[[Callable], Callable], **options: Any) -> list[Tensor | None]:
        torch.manual_seed(0)
        net, lr = Net(), torch.tensor(0.1, requires_grad=True)
        inner, xs = metaoptim.MetaSGD([net], lr=lr), torch.randn(6, 2, 5, 3)
        step = wrap(lambda x: inner.step(net(x).square().mean()))
        with metaoptim.SlidingWindow(offline=True, **options):
            for x in xs:
                step(x)
            net(xs[0]).square().mean().backward()
        return [lr.grad, *(p.grad for p in net.parameters())]

    with caplog.at_level("INFO", "metaoptim.recompiles"):
        found = gradient(metaoptim.compile(backend="eager"))
    assert sum("compiled in" in record.getMessage() for record in caplog.records) == 1
    for a, b in zip(found, gradient(lambda fn: fn, strategy="full_tape"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
