"""Inner optimizers: `torch.optim` by name, numbers and state, differentiable by what they are given.

In: networks and hyper-parameters. Out: pure update functions, and steps handed to the window that is open. Imports:
`runtime` and what is below it.
"""

from . import schedules, transforms
from .adam import MetaAdam
from .base.hyper import safe_sqrt
from .functional import FunctionalOptimizer, functional
from .learned import MetaLearned
from .optimizer import MetaOptimizer
from .rmsprop import MetaRMSprop
from .rules import PerParameterRule, PerTensorRule
from .sgd import MetaSGD
from .wrapped.named import (
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
from .wrapped.wrap import wrap

MetaRMSProp = MetaRMSprop  # as the original project spells it

__all__ = [
    "FunctionalOptimizer",
    "MetaASGD",
    "MetaAdadelta",
    "MetaAdafactor",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaLearned",
    "MetaMuon",
    "MetaNAdam",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaRprop",
    "MetaSGD",
    "functional",
    "PerParameterRule",
    "PerTensorRule",
    "safe_sqrt",
    "schedules",
    "transforms",
    "wrap",
]
