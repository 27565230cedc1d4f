"""One torch thread per test process, and float64 throughout: tests compare to many digits."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
