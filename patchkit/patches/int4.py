"""int4: int4 weights, in groups of inputs, for feed-forward blocks, attention and, if asked for, the LM head.

1. Each group of 32 or 128 inputs of an output has a scale and a minimum in fp16, and its weights are 16 levels:
   ``w = level * scale + minimum``, or ``(level - 8) * scale`` if symmetric.
2. Weights that are on such grids already, such as those of a GGUF file in Q4_0 or Q4_1, keep their values.
3. Others are rounded without data of the user's: of a few widths of the grid, each fitted by least squares, a group has the one with the
   smallest squared error. There an error counts as the mean square of its input on 64 random tokens, or on a calibration text (as in the
   importance matrices of llama.cpp). Rounding with error feedback on calibration text (Frantar et al. 2022, GPTQ,
   https://arxiv.org/abs/2210.17323) is an option.
4. Weights stay in their modules and run the op `int4_linear`, as `mlp_int8` says of int8. An embedding that shares the head's weight stays
   as it is.

For a CPU. On a GPU, torchao and GemLite have int4 kernels that work with transformers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from patchkit.anatomy.target import Target
from patchkit.definitions import rounded_in_groups
from patchkit.errors import SpecError, UnsupportedModel
from patchkit.int4.importance import mean_squares
from patchkit.int4.scheme import Int4Scheme
from patchkit.kernels.int4_layout import GROUPS
from patchkit.patch import Facts, Promises, register_patch
from patchkit.quantised.find_blocks import Scope, find_blocks
from patchkit.quantised.options import QuantisedWeights

_FITS = ("clip", "gptq")


@register_patch("int4")
@dataclass(frozen=True)
class Int4(QuantisedWeights):
    """int4 weights for the linear layers of feed-forward blocks and attention, and the LM head, on a CPU.

    The options mode, keep_original, modules, min_snr, calibration, strict and view are those of `QuantisedWeights`; mode "dynamic" rounds
    activations per token and group.

    Args:
        scope: "mlp" for feed-forward blocks, "all" for these and attention, "all+head" for the head too.
        group: inputs that share a scale, 32 or 128.
        symmetric: no minimum for each group: 4.5 in place of 5 bits a weight in groups of 32, and less accurate.
        fit: "clip" needs no data; "gptq" needs a ``calibration`` text of some thousand tokens, and cannot follow weights that change.

    Raises:
        ValueError: an option out of range.
    """

    facts = Facts(
        goal="fewest bytes per token on a CPU: 4 bits a weight",
        exact="no: weights are rounded; the signal-to-noise ratio of each module, and how often the head chooses another token, are in the "
        "report. Weights that come from a GGUF file in Q4_0 or Q4_1 keep their values",
        cost="a CPU; patching takes seconds, times itself, and warns where it is slower. With `keep_original=False` it cannot be undone",
        source="[llama.cpp](https://github.com/ggml-org/llama.cpp) (blocks of 32, importance of inputs); Frantar et al. 2022, "
        "[2210.17323](https://arxiv.org/abs/2210.17323)",
    )

    scope: Scope = "all"  # type: ignore[misc]  # of the base class it is fixed
    group: Literal[32, 128] = 32
    symmetric: bool = False
    fit: Literal["clip", "gptq"] = "clip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.group, bool) or self.group not in GROUPS:
            raise ValueError(f"group={self.group!r}: give {' or '.join(map(str, GROUPS))}")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric={self.symmetric!r}: give True or False")
        if self.fit not in _FITS:
            raise ValueError(f"fit={self.fit!r}: give one of {', '.join(map(repr, _FITS))}")
        if self.fit == "gptq" and self.view:
            raise ValueError("view=True follows weights that are trained, which fit='gptq' cannot: leave one of the two out")

    @property
    def scheme(self) -> Int4Scheme:
        return Int4Scheme(self.group, self.symmetric, self.fit)

    def check(self, target: Target) -> None:
        if self.fit == "gptq" and self.calibration is None:
            raise SpecError("int4(fit=gptq) needs calibration=: give the token ids of some thousand tokens of text, or leave fit out")
        device = target.model.device.type
        if device not in ("cpu", "meta"):  # what is not loaded is refused by its own name
            raise UnsupportedModel(
                f"{type(target.model).__name__} is on {device}, and int4 is for a CPU: there, use torchao (Int4WeightOnlyConfig) or "
                "GemLite, and patch the model that they have quantised with the other patches"
            )
        super().check(target)
        mean_squares(target, self._layers(target), self.calibration)  # while the model is not patched yet

    def promises(self, target: Target) -> Promises:
        if self.fit != "clip":
            return Promises(rounds=True)
        squares = mean_squares(target, self._layers(target), self.calibration)
        by_rule = functools.partial(rounded_in_groups, group=self.group, symmetric=self.symmetric, squares=squares)
        return Promises(definition=by_rule, rounds=True)

    def _layers(self, target: Target) -> dict[str, Any]:
        """The linear layers that are converted, by name."""
        return {block.name: block.module for block in find_blocks(target, self.modules, self.scope, self.scheme, self.view).linears}

    @classmethod
    def candidates(cls, target: Target) -> list[Any]:
        return [cls(scope=scope) for scope in ("all", "all+head")] if target.model.device.type == "cpu" else []
