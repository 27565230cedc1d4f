"""PyTorch's own operator database, operator by operator, inside an inner loop, in every form, against a tape by hand.

``python tests/helpers/operators.py`` goes through all of them and writes docs/operators.md; with names, it
prints what it finds of these.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal import common_methods_invocations as database

from sweep_pages import main
from sweeps import Fed, Found, compared, found_of

# It seeds random operators at each call, which compiled functions refuse; here they draw one after the other.
_seeded, database.wrapper_set_seed = (
    database.wrapper_set_seed,
    lambda op, *args, **kwargs: op(*args, **kwargs),
)
DTYPES = {torch.float64: "", torch.complex128: " complex"}
OPS: dict[str, list[Any]] = {}  # name -> its entries in the database
for _op in database.op_db:
    if _op.supports_autograd and not _op.supported_dtypes("cpu").isdisjoint(DTYPES):
        OPS.setdefault(_op.name, []).append(_op)
        if _op.gradcheck_wrapper is _seeded:
            _op.gradcheck_wrapper = database.wrapper_set_seed

TABLE = Path(__file__).parents[2] / "docs" / "operators.md"
SHARE = 24  # tests take every so manieth operator by default;
_SCANNED = 4  # every so manieth is also tried in a scan
#: What stands for the others where all is compiled by inductor, which takes a minute for each: one loss of several.
COMPILED = {
    "products": (
        "nn.functional.linear", "matmul", "einsum", "bmm", "nn.functional.conv2d",
        "nn.functional.conv_transpose2d",
    ),
    "norms and attention": (
        "nn.functional.layer_norm", "nn.functional.batch_norm", "nn.functional.group_norm",
        "nn.functional.scaled_dot_product_attention", "softmax", "nn.functional.dropout",
    ),
    "places": (
        "index_select", "gather", "index_put", "scatter_add", "masked_fill",
        "nn.functional.embedding",
    ),
    "reductions": (
        "sum", "var", "logsumexp", "amax", "prod", "cumsum",
    ),
    "activations and losses": (
        "nn.functional.gelu", "nn.functional.softplus", "nn.functional.silu",
        "nn.functional.cross_entropy", "nn.functional.binary_cross_entropy_with_logits",
        "nn.functional.huber_loss",
    ),
    "order and images": (
        "sort", "topk", "nn.functional.max_pool2d", "nn.functional.avg_pool2d",
        "nn.functional.interpolate", "nn.functional.pad",
    ),
    "linear algebra": (
        "linalg.solve", "linalg.cholesky", "linalg.inv", "fft.rfft", "fft.irfft", "cdist",
    ),
}  # fmt: skip


class Call:
    """A call of an operator with a sample of the database."""

    def __init__(self, op: Any, function: Callable, sample: Any, reach: float) -> None:
        self.op, self.function, self.sample = op, function, sample
        self.arguments = Fed((sample.input, *sample.args), sample.kwargs, reach)

    def inside(self) -> list[nn.Module]:
        """None."""
        return []

    def __call__(self, inside: Iterator[nn.Module], z: Tensor) -> Any:
        """What the operator gives, as the database would have it: of a Hermitian matrix, without its gauge."""
        args, kwargs = self.arguments(z)
        return self.sample.output_process_fn_grad(self.op.gradcheck_wrapper(self.function, *args, **kwargs))


def _as_called(op: Any) -> Callable:
    """An entry's function, found by its name at every call, as users find it."""
    for home in (torch, torch.nn.functional, torch.linalg, torch.special, torch.fft):
        attribute = getattr(op.op, "__name__", "")
        if getattr(home, attribute, None) is op.op:
            return lambda *args, **kwargs: getattr(home, attribute)(*args, **kwargs)
    return op


def variants(name: str) -> Iterator[tuple[str, Any, torch.dtype, Callable]]:
    """The entries of an operator, as they are and in place: what to call each, the entry, its type, the function."""
    for op, dtype in itertools.product(OPS[name], DTYPES):
        if dtype in op.supported_dtypes("cpu"):
            full = f"{name}.{op.variant_test_name}" if op.variant_test_name else name
            yield full + DTYPES[dtype], op, dtype, _as_called(op)
            if op.inplace_variant is not None:
                in_place = op.inplace_variant
                yield (
                    f"{full}{DTYPES[dtype]} in place",
                    op,
                    dtype,
                    lambda x, *args, f=in_place, **kw: f(x.clone(), *args, **kw),
                )


def calls(op: Any, dtype: torch.dtype, function: Callable, in_place: bool) -> list[list[Call]]:
    """The samples of an entry; each also close to what it was, where it may be at its domain's bounds."""
    torch.manual_seed(0)
    try:
        samples = [*op.sample_inputs("cpu", dtype, requires_grad=True)]
    except (ImportError, RuntimeError):  # a few need what is not installed, or have none of this type
        return []
    given = [s for s in samples if not in_place or not s.broadcasts_input]
    tries = [[Call(op, function, sample, reach) for reach in (1.0, 1e-3)] for sample in given]
    return [both for both in tries if both[0].arguments.any]


def _ends_first(tries: list[Any]) -> list[Any]:
    """The first, the last and the middle one before the others: a few samples are of different kinds then."""
    ends = [*dict.fromkeys([0, len(tries) - 1, len(tries) // 2])] if tries else []
    return [tries[i] for i in (*ends, *(i for i in range(len(tries)) if i not in ends))]


def forms_of(name: str) -> list[str]:
    """The forms that an operator is tried in: a scan takes longer than the others, and does the same to most."""
    scanned = [*OPS].index(name) % _SCANNED == 0
    return ["A", "B", "C", *(["scan"] if scanned else [])]


def sweep(
    name: str, forms: Iterable[str] | None = None, most: int | None = None, cannot: Counter[str] | None = None
) -> Iterator[Found]:
    """What forms do with the samples of each entry of an operator, or with ``most`` of them; or inductor with a group.

    ``cannot`` counts the samples that eager PyTorch cannot differentiate twice, by entry.
    """
    if name in COMPILED:
        yield from found_of(name, _group(name), ["inductor"])
        return
    forms = forms_of(name) if forms is None else [*forms]
    for full, op, dtype, function in variants(name):
        tries = calls(op, dtype, function, full.endswith(" in place"))
        samples, left_out = compared(_ends_first(tries), most)
        if cannot is not None and left_out:
            cannot[full] = left_out
        if samples:
            yield from found_of(full, samples, forms)


def _group(name: str) -> list[Call]:
    """Two samples of each operator of a group of `COMPILED`."""
    samples: list[Call] = []
    for operator in COMPILED[name]:
        _, op, dtype, function = next(variants(operator))
        samples += compared(_ends_first(calls(op, dtype, function, False)), 2)[0]
    return samples


HEAD = f"""# Operators

PyTorch's database of operators (`op_db`), all samples of each entry that have a derivative, of float64 and of
complex128, as they are and in place, inside an inner loss that feeds every differentiable input from the network and
from a meta-parameter, two inner steps (six in a scan) with a learnt rate. `python tests/helpers/operators.py` compares
the meta-gradients with a plain tape and writes this page; `tests/exact/test_operators.py` holds it to that, for a share
of the operators, or for all of them with `--whole-sweep`. Modules have a page of their own: [modules.md](modules.md).

Every {_SCANNED}th operator is also tried in a scan. {sum(map(len, COMPILED.values()))} of them, in {len(COMPILED)} \
groups with a loss each, are compiled by inductor.
"""

if __name__ == "__main__":
    main([*OPS, *COMPILED], sweep, HEAD, TABLE)
