"""int8: int8 weights for feed-forward blocks, attention and, if asked for, the LM head.

`mlp_int8` is this patch with ``scope="mlp"``; how weights are rounded, run and saved is said there. What is added:

1. The projections of attention. Rounding them harms more than rounding feed-forward blocks; `min_snr` leaves the worst out.
2. The head, row by row of the vocabulary. Where it shares its weight with the embeddings, these stay as they are: tokens are looked up
   exactly, and the int8 copy is in memory beside them. Its signal-to-noise ratio, and at how many positions of the calibration text
   another token becomes the likeliest, are in the report. Checkpoints hold the head in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass

from patchkit.anatomy.target import Target
from patchkit.patch import Facts, register_patch
from patchkit.patches.mlp_int8 import MLPInt8
from patchkit.quantised.find_blocks import Scope


@register_patch("int8")
@dataclass(frozen=True)
class Int8(MLPInt8):
    """int8 weights for the linear layers of feed-forward blocks and attention, and the LM head.

    The options mode, keep_original, modules, min_snr, calibration, strict and view are those of `MLPInt8`.

    Args:
        scope: "mlp" for feed-forward blocks, "all" for these and attention, "all+head" for the head too.

    Raises:
        ValueError: an option out of range.
    """

    facts = Facts(
        goal="fewest bytes per token in int8: attention and, if asked for, the head too",
        exact="no: weights are rounded; the signal-to-noise ratio of each module, and how often the head chooses another token, are "
        "in the report",
        cost=MLPInt8.facts.cost,
        source=MLPInt8.facts.source,
    )

    scope: Scope = "all"  # type: ignore[misc]  # of the base class it is fixed

    @classmethod
    def candidates(cls, target: Target) -> list[MLPInt8]:
        return [cls(scope=scope) for scope in ("all", "all+head")]
