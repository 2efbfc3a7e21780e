"""The sections in order of worth, with their functions and times."""

from __future__ import annotations

from collections.abc import Callable

import torch

from evals.gpu.bandwidth import bandwidth
from evals.gpu.correctness import correctness
from evals.gpu.decode import decode
from evals.gpu.linear import linear
from evals.gpu.rows import Cases
from evals.gpu.sizes import Sizes
from evals.gpu.smollm2 import smollm2
from evals.gpu.verification import verification

SECTIONS: dict[str, Callable[[Sizes, torch.device], Cases]] = {
    "correctness": correctness,
    "decode": decode,
    "smollm2": smollm2,
    "bandwidth": bandwidth,
    "linear": linear,
    "verification": verification,
}


# Seconds; the next section may use the time that one leaves.
LIMITS = {"correctness": 160, "decode": 200, "smollm2": 180, "bandwidth": 80, "linear": 60, "verification": 30}
