"""The optimizers of torch and of other libraries as inner ones: their own steps, captured.

In: a `torch.optim.Optimizer`, or the arguments of one. Out: a `MetaOptimizer` whose update is the captured step.
Imports: the rest of `metaoptim.optim`, and the compiler.
"""

from .named import (
    MetaAdadelta,
    MetaAdafactor,
    MetaAdagrad,
    MetaAdamax,
    MetaAdamW,
    MetaASGD,
    MetaMuon,
    MetaNAdam,
    MetaRAdam,
    MetaRprop,
)
from .wrap import Wrapped, wrap

__all__ = [
    "MetaASGD",
    "MetaAdadelta",
    "MetaAdafactor",
    "MetaAdagrad",
    "MetaAdamW",
    "MetaAdamax",
    "MetaMuon",
    "MetaNAdam",
    "MetaRAdam",
    "MetaRprop",
    "Wrapped",
    "wrap",
]
