"""metaoptim: exact meta-gradients in bounded memory, from ordinary PyTorch code.

In: a user's networks, losses and functions. Out: gradients, reports. Imports: all that is below.
"""

from . import logs
from .compile import compile, explain
from .errors import (
    BudgetError,
    CaptureError,
    LossError,
    MetaOptimError,
    ProgramError,
    StaleInputError,
    StoreError,
    UnreachableWarning,
    WindowError,
)
from .optim import (
    MetaAdadelta,
    MetaAdafactor,
    MetaAdagrad,
    MetaAdam,
    MetaAdamax,
    MetaAdamW,
    MetaASGD,
    MetaLearned,
    MetaMuon,
    MetaNAdam,
    MetaOptimizer,
    MetaRAdam,
    MetaRMSProp,
    MetaRMSprop,
    MetaRprop,
    MetaSGD,
    PerParameterRule,
    PerTensorRule,
    functional,
    safe_sqrt,
    schedules,
    transforms,
    wrap,
)
from .plan import plan
from .report.profile import Profile, profile
from .runtime.engine.estimators.evolution import Evolution
from .runtime.engine.estimators.implicit import Implicit
from .runtime.engine.monitoring.progress import progress
from .states import extract_state, recover_state, reptile, stop_gradient
from .vmap import vmap
from .window import SlidingWindow, zero_nan_hook

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CaptureError",
    "Evolution",
    "Implicit",
    "LossError",
    "MetaASGD",
    "MetaAdadelta",
    "MetaAdafactor",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaMuon",
    "MetaNAdam",
    "MetaLearned",
    "MetaOptimError",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaRprop",
    "MetaSGD",
    "PerParameterRule",
    "PerTensorRule",
    "Profile",
    "ProgramError",
    "SlidingWindow",
    "StaleInputError",
    "StoreError",
    "UnreachableWarning",
    "WindowError",
    "compile",
    "explain",
    "extract_state",
    "functional",
    "plan",
    "profile",
    "progress",
    "recover_state",
    "reptile",
    "safe_sqrt",
    "schedules",
    "stop_gradient",
    "transforms",
    "wrap",
    "vmap",
    "zero_nan_hook",
]

logs.configure_from_environment()
