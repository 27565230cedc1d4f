"""Inner optimizers: `torch.optim` by name, numbers and state, differentiable by what they are given.

In: networks and hyper-parameters. Out: pure update functions, and steps handed to the window that is open. Imports:
`runtime` and what is below it.
"""

from .adam import MetaAdam
from .hyper import safe_sqrt
from .learned import MetaLearned
from .optimizer import MetaOptimizer
from .rmsprop import MetaRMSprop
from .rules import PerParameterRule, PerTensorRule
from .sgd import MetaSGD

__all__ = [
    "MetaAdam",
    "MetaLearned",
    "MetaOptimizer",
    "MetaRMSprop",
    "MetaSGD",
    "PerParameterRule",
    "PerTensorRule",
    "safe_sqrt",
]
