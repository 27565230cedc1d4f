"""Operators whose derivatives look at values, that draw or check values, or that torch cannot differentiate twice.

In every form the number of the full tape, or an error of metaoptim that says what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import metaoptim
from oracle import agree

torch.manual_seed(0)
XS = torch.randn(3, 6, 4, dtype=torch.float64)
COLUMNS = torch.tensor([[0, 1, 0, 1, 0]] * 6)
ROW = torch.tensor([1, 1, 3])
SMOOTH = torch.hann_window(8, dtype=torch.float64)
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def outcome(
    form: str, loss: Loss, build: Callable[[], nn.Module] = network, slots: int | None = None, **options: Any
) -> dict[str, Tensor | None]:
    """The outer loss, gradients, and where the random stream is, of two inner steps of ``loss(net, x, w)``."""
    net, w = build(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    if form == "C":

        @metaoptim.compile(backend="eager", slots=slots)
        def meta_loss(net: nn.Module, w: Tensor, lr: Tensor) -> Tensor:
            inner = metaoptim.MetaSGD([net], lr=lr, **options)
            with metaoptim.SlidingWindow(offline=True):
                for t in range(2):
                    inner.step(loss(net, XS[t], w))
                return net(XS[2]).square().mean() * w

        outer = meta_loss(net, w, lr)
        outer.backward()
    else:
        inner = metaoptim.MetaSGD([net], lr=lr, **options)

        def step(x: Tensor) -> None:
            inner.step(loss(net, x, w))

        take = metaoptim.compile(backend="eager")(step) if form == "B" else step
        how: Any = {"strategy": "full_tape"} if form == "tape" else {"slots": slots}
        with metaoptim.SlidingWindow(offline=True, **how):
            for t in range(2):
                take(XS[t])
            outer = net(XS[2]).square().mean() * w
            outer.backward()
    random = torch.rand(2, dtype=torch.float64)
    found = {"outer": outer.detach(), "w": w.grad, "lr": lr.grad, "random": random}
    return found | {n: p.grad for n, p in net.named_parameters()}


def written(h: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    h = h.clone()
    change(h)
    return h


def scattered(net: nn.Module, x: Tensor, w: Tensor, **options: Any) -> Tensor:
    h = net(x)
    return h.scatter_reduce(1, COLUMNS[:, :4], h.sin()[:, :4] * w, "prod", **options)


def prods_with_zeros(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    """One zero for each place: torch's formula has a branch of its own for it."""
    h = net(x)
    source = h.sin() * torch.tensor([0.0, 1, 1, 0, 1], dtype=torch.float64)
    return h.scatter_reduce(1, COLUMNS, source, "prod") - w


def forward_mode(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x[0], x[1])).sin()).tangent
    assert tangent is not None
    return tangent * w


def jacobian(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    parameters = dict(net.named_parameters())
    return w * torch.func.jacfwd(lambda z: torch.func.functional_call(net, parameters, (z,)).sin())(x[0])


def slope_of_parts(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    """A derivative through values that autograd has saved beside others that are written in place."""
    x = x.clone().requires_grad_()
    a, b = (net(x) * w).unsafe_chunk(2, 1)
    (slope,) = torch.autograd.grad(a.sigmoid_().sum() + b.tanh_().sum(), x, create_graph=True)
    return slope


def slope_of_a_cell(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    weights = (
        torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5).cos(),
        torch.ones(6, 2).double().tril() / 2,
    )
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        torch.gru_cell(net(x) * w, x[:, :2].detach(), *weights).sum(), x, create_graph=True
    )
    return slope


def fresh(*shape: int, **options: Any) -> Tensor:
    return torch.empty(*shape, dtype=torch.float64, **options)


OPERATORS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "forward over reverse": lambda net, x, w: torch.func.jvp(
        torch.func.grad(lambda z: net(z).abs().pow(3).sum()), (x,), (x.cos(),)
    )[1]
    * w,
    "slope of parts written in place": slope_of_parts,
    "slope of a cell": slope_of_a_cell,
    "copy_ into a fresh tensor": lambda net, x, w: fresh(6, 5).copy_(net(x) * w),
    "copy_, spread": lambda net, x, w: fresh(3, 6, 5).copy_(net(x)[:1] * w),
    "copy_ to another dtype": lambda net, x, w: torch.empty(6, 5).copy_(net(x) * w).double(),
    "copy_, transposed, and a view of it": lambda net, x, w: fresh(5, 6).t().copy_(net(x) * w).t().view(-1)[3:],
    "assignment": lambda net, x, w: written(fresh(6, 5), lambda h: h.__setitem__(slice(None), net(x) * w)),
    "diff": lambda net, x, w: torch.diff(net(x) * w, n=2, prepend=net(x)[:, :1]),
    "scatter_reduce prod": scattered,
    "scatter_reduce prod, not itself": lambda net, x, w: scattered(net, x, w, include_self=False),
    "scatter_reduce prod with zeros": prods_with_zeros,
    "scatter_reduce_ prod": lambda net, x, w: (net(x) * w).scatter_reduce_(1, COLUMNS, net(x), "prod"),
    "scatter_reduce mean": lambda net, x, w: net(x).scatter_reduce(1, COLUMNS, net(x) * w, "mean"),
    "scatter_reduce prod of a number": lambda net, x, w: w.scatter_reduce(0, ROW[0] - 1, net(x).sum(), "prod"),
    "index_reduce prod": lambda net, x, w: net(x).index_reduce(0, ROW, net(x)[:3] * w, "prod"),
    "index_reduce_ prod, not itself": lambda net, x, w: (net(x) * w).index_reduce_(
        1, ROW, net(x)[:, :3], "prod", include_self=False
    ),
    "index_reduce amax": lambda net, x, w: net(x).index_reduce(0, ROW, net(x)[:3] * w, "amax"),
    "index_fill": lambda net, x, w: net(x).index_fill(-1, ROW, w),
    "index_fill_ of a view": lambda net, x, w: written(net(x), lambda h: h[:3].index_fill_(1, ROW, w)),
    "index_fill of a number": lambda net, x, w: net(x).sum().index_fill(0, ROW[:1] - 1, w) * net(x).sum(),
    "a mask set to a value": lambda net, x, w: written(net(x), lambda h: h.__setitem__(x[:, 0] > 0, w)),
    "a mask set to rows": lambda net, x, w: written(
        net(x), lambda h: h.__setitem__(x[:, 0] > 0, net(x)[:1] * w)
    ),
    "a mask of columns": lambda net, x, w: written(
        net(x), lambda h: h.__setitem__((slice(None), x[0].new_tensor([1, 0, 0, 1, 1]) > 0), w * net(x)[:, :1])
    ),
    "a mask, accumulated": lambda net, x, w: net(x).index_put((x[:, 0] > 0,), w, accumulate=True),
    "integer indices set": lambda net, x, w: written(net(x), lambda h: h.__setitem__(ROW[1:], net(x)[:2] * w)),
    "rrelu in eval mode": lambda net, x, w: F.rrelu(net(x) * w, training=False),
    "rrelu_ in eval mode": lambda net, x, w: F.rrelu_(net(x) * w, training=False),
    "cov": lambda net, x, w: torch.cov(net(x).T * w),
    "corrcoef": lambda net, x, w: torch.corrcoef(net(x).T + w),
    "nuclear norm": lambda net, x, w: torch.linalg.matrix_norm(torch.polar(net(x) * w, 9 * x[0, 0] + net(x)), "nuc"),
    "pinverse": lambda net, x, w: torch.view_as_real(torch.pinverse(torch.polar(net(x) * w, 9 * x[0, 0] + net(x)))),
    "istft": lambda net, x, w: torch.istft(torch.polar(net(x).t() * w, net(x).t()), 8, window=SMOOTH).sin(),
    "gaussian_nll_loss": lambda net, x, w: F.gaussian_nll_loss(net(x), x.sum() * w, net(x).exp()),
    "a constant's value": lambda net, x, w: net(x) * w * torch.arange(5).sum().div(3).item(),
    "as many as a constant says": lambda net, x, w: net(x).repeat_interleave(torch.tensor([2, 0, 1, 1, 3]), 1) * w,
    "columns of a constant mask": lambda net, x, w: net(x)[:, torch.tensor([True, False, True, True, False])] * w,
    "a constant mask of entries": lambda net, x, w: net(x)[torch.ones(x.shape[0], 5).tril() > 0] * w,
    "entries of a constant mask selected": lambda net, x, w: (net(x) * w).masked_select(torch.ones(x.shape[0], 5) > 0),
    "rows of a constant mask set": lambda net, x, w: written(
        net(x), lambda h: h.__setitem__(torch.arange(x.shape[0]) > 1, net(x)[2:] * w)
    ),
    "unique": lambda net, x, w: net(x)[:, torch.unique(torch.tensor([3, 0, 3]))] * w,
    "vmapped dropout": lambda net, x, w: torch.vmap(lambda r: F.dropout(r, 0.4), randomness="different")(net(x) * w),
    "bernoulli with a number": lambda net, x, w: net(x) * w * torch.bernoulli(net(x).detach(), p=0.3),
    "forward mode": forward_mode,
    "jacfwd": jacobian,
}  # fmt: skip


def of(name: str) -> Loss:
    return lambda net, x, w: OPERATORS[name](net, x, w).square().mean()


@pytest.mark.filterwarnings("ignore:index_reduce", "ignore:`torch.jit.script`")
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    expected = outcome("tape", of(name))
    assert expected["w"] is not None and expected["lr"] is not None and float(expected["lr"].abs()) > 1e-6
    for form in "ABC":
        agree(outcome(form, of(name), slots=1), expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_forward_mode_in_one_capture_after_the_other() -> None:
    """torch remembers fake results, and forgets how large a storage the tangent of a view has."""
    expected = outcome("tape", of("jacfwd"))
    for _ in range(2):
        agree(outcome("C", of("jacfwd")), expected, rtol=1e-9)


@pytest.mark.parametrize("inplace", [False, True])
def test_random_slopes(inplace: bool) -> None:
    """As many are drawn as there are negative values."""

    def loss(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        return (F.rrelu(net(x) * w, training=True, inplace=inplace) - 0.1).square().mean()

    expected = outcome("tape", loss)
    agree(outcome("A", loss, slots=1), expected, rtol=1e-9)
    for form in "BC":
        with pytest.raises(metaoptim.CaptureError, match="as many as the values decide"):
            outcome(form, loss)


def test_products_of_several_zeros() -> None:
    """torch refuses their second derivative, which is not zero."""

    def factors(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        h, zero = net(x), torch.tensor([1.0, 0, 1, 0, 0], dtype=torch.float64)
        return h, (h - h.detach()) * zero + h.sin() * (1 - zero)

    def scattered(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        h, source = factors(net, x)
        return (h.scatter_reduce(1, COLUMNS, source, "prod") - w).square().mean()

    def by_hand(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        h, s = factors(net, x)
        columns = [h[:, 0] * s[:, 0] * s[:, 2] * s[:, 4], h[:, 1] * s[:, 1] * s[:, 3], *h[:, 2:].unbind(1)]
        return (torch.stack(columns, 1) - w).square().mean()

    with pytest.raises(RuntimeError, match=">1 zeros"):
        outcome("tape", scattered)
    expected = outcome("tape", by_hand)
    for form in "ABC":
        agree(outcome(form, scattered), expected, rtol=1e-9)


# -- what torch cannot differentiate twice ----------------------------------------------------------------------------


def connectionist(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    lengths = torch.tensor([6, 6]), torch.tensor([2, 2])
    scores = (net(x)[:, None] * torch.stack([w, w * 2])[:, None]).log_softmax(-1)
    return F.ctc_loss(scores, torch.tensor([[1, 2], [2, 3]]), *lengths)


ONCE: dict[str, Loss] = {
    "cdist": lambda net, x, w: torch.cdist(net(x), net(x) * w + 1).mean(),
    "embedding_bag": lambda net, x, w: F.embedding_bag(ROW[None], net(x) * w).square().mean(),
    "multi_margin_loss": lambda net, x, w: F.multi_margin_loss(net(x) * w, torch.tensor([0, 1, 2, 3, 4, 0])),
}


@pytest.mark.parametrize("name", ONCE)
def test_without_a_second_derivative(name: str) -> None:
    if name == "cdist" and not torch.__version__.startswith("2.13"):  # which has got one
        for form in "ABC":
            agree(outcome(form, ONCE[name], slots=2), outcome("tape", ONCE[name]), rtol=1e-9)
        return
    with pytest.raises(RuntimeError, match="not implemented"):
        outcome("tape", ONCE[name])
    expected = outcome("tape", ONCE[name], first_order=True)
    for form in "ABC":
        with pytest.raises(metaoptim.CaptureError, match=r"cannot be differentiated.*first_order=True"):
            outcome(form, ONCE[name], slots=2)
        agree(outcome(form, ONCE[name], first_order=True), expected, rtol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_that_torch_gets_wrong(reduction: str) -> None:
    def in_chunks(net: Any, x: Tensor, w: Tensor) -> Tensor:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
        h, y = net[:2](x), torch.tensor([0, 1, 2, 3, 4, 0])
        losses = F.linear_cross_entropy(
            h, net[2].weight * w, y, linear_bias=net[2].bias, reduction=reduction, options=options
        )
        return losses.mean()

    expected = outcome("tape", in_chunks, first_order=True)
    for form in "ABC":
        with pytest.raises(
            metaoptim.CaptureError, match=r"linear_cross_entropy with `options` has no second"
        ):
            outcome(form, in_chunks, slots=2)
        agree(outcome(form, in_chunks, first_order=True), expected, rtol=1e-9)


def test_ctc_loss() -> None:
    with pytest.raises(metaoptim.CaptureError, match=r"cannot be differentiated.*ctc.*first_order=True"):
        outcome("A", connectionist)
    expected = outcome("tape", connectionist, first_order=True)
    agree(outcome("A", connectionist, first_order=True), expected, rtol=1e-9)
    for form in "BC":
        with pytest.raises(metaoptim.CaptureError, match="shape depends on values"):
            outcome(form, connectionist)


@pytest.mark.parametrize("form", ["tape", "A", "B", "C"])
def test_without_a_first_derivative(form: str) -> None:
    with pytest.raises(metaoptim.MetaOptimError, match="floor_divide is not implemented") as caught:
        outcome(form, lambda net, x, w: net(x).floor_divide(0.3).sum() * w)
    assert "While executing" not in str(caught.value)


@pytest.mark.parametrize("form", "BC")
def test_values_that_are_not_known(form: str) -> None:
    weights = torch.tensor([1, 2, 1, 1, 3, 1])
    with pytest.raises(metaoptim.CaptureError, match="a value is needed"):
        outcome(form, lambda net, x, w: torch.cov(net(x).T * w, fweights=weights).mean())
    with pytest.raises(metaoptim.CaptureError, match="depends on a tensor"):
        outcome(form, lambda net, x, w: net(x).mean() * torch.poisson(w.detach()))


# -- what the shapes of a step do not tell ----------------------------------------------------------------------------


def test_packed_sequences_of_other_lengths_and_equal_shapes() -> None:
    """The derivative's formula reads the lengths: eight elements in four time steps, both times."""
    lengths = torch.tensor([[4, 3, 1], [4, 2, 2], [4, 3, 1]])

    def gradients(strategy: str) -> list[Tensor]:
        torch.manual_seed(0)
        net, x, w = nn.Linear(3, 2).double(), torch.randn(3, 3, 4, 3).double(), torch.randn(8, 2).double()
        lr = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        inner = metaoptim.MetaSGD([net], lr=lr)
        with metaoptim.SlidingWindow(offline=True, strategy=strategy):
            for k in range(3):
                packed = nn.utils.rnn.pack_padded_sequence(net(x[k]), lengths[k], batch_first=True)
                inner.step((packed.data.square() * w).mean())
            return list(torch.autograd.grad(net(x[0]).square().mean(), [lr, *net.parameters()]))

    agree(dict(zip("abc", gradients("auto"))), dict(zip("abc", gradients("full_tape"))))


class Strided:
    """A loss with `as_strided` on rows of one tensor; ``offset`` counts from the start of its memory."""

    def __init__(self, offset: Callable[[Tensor], int]) -> None:
        torch.manual_seed(0)
        self.net, self.base, self.u = nn.Linear(3, 2).double(), torch.randn(3, 5).double(), XS[0, :4, :3]
        self.base.requires_grad_()
        self.offset = offset

    def __call__(self, x: Tensor, strategy: str = "auto") -> Tensor:
        inner = metaoptim.MetaSGD([self.net], lr=0.2)
        with metaoptim.SlidingWindow(offline=True, strategy=strategy):
            for row in x:
                inner.step(
                    (self.net(self.u) * row.as_strided((4, 2), (1, 1), self.offset(row))).square().mean()
                )
            return self.net(self.u).square().mean()

    def gradient(self, *strategy: str) -> Tensor:
        return torch.autograd.grad(self(self.base, *strategy), self.base)[0]


def test_offsets_that_count_from_the_start_of_memory() -> None:
    own = Strided(Tensor.storage_offset)
    torch.testing.assert_close(own.gradient(), own.gradient("full_tape"), rtol=1e-10, atol=1e-12)
    with pytest.raises(metaoptim.CaptureError, match="storage_offset=1 on a tensor"):
        Strided(lambda row: 1).gradient()
    with pytest.raises(metaoptim.CaptureError, match="storage_offset=0 on a tensor"):
        metaoptim.compile(Strided(lambda row: 0), backend="eager")(own.base.detach()[1:])


# -- lazy modules -----------------------------------------------------------------------------------------------------


def lazy() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LazyLinear(5)).double()


def begun() -> nn.Module:
    net = lazy()
    torch.manual_seed(5)
    with torch.no_grad():
        net(XS[0])
    return net


def plain(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    return net(x).square().mean() * w


def test_a_lazy_module_begins_in_a_window() -> None:
    expected = outcome("tape", plain, begun)
    for slots in (None, 1):
        found = outcome("A", plain, lazy, slots)
        found["random"] = expected["random"]  # it was made after the seed, or before
        agree(found, expected, rtol=1e-9)


def test_lazy_modules_that_cannot_begin_here() -> None:
    for form in "BC":
        with pytest.raises(metaoptim.CaptureError, match="run the network once before"):
            outcome(form, plain, lazy)
    with (
        warnings.catch_warnings(),
        pytest.raises(metaoptim.WindowError, match=r"running_mean.*run the network"),
    ):
        warnings.simplefilter("ignore")
        outcome("A", plain, lambda: nn.Sequential(nn.Linear(4, 5), nn.LazyBatchNorm1d()).double())
