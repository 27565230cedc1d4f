"""The original name of the package: ``import MetaOptim`` gives everything that ``metaoptim`` exports."""

from metaoptim import *
from metaoptim import __all__ as __all__
