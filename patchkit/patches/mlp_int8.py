"""mlp_int8: int8 weights for the linear layers of the feed-forward blocks, and nothing else.

1. Weights are rounded to int8, symmetric, with one scale per output channel (Dettmers et al. 2022, LLM.int8(),
   https://arxiv.org/abs/2208.07339).
2. Each stays in its `nn.Linear` (or `Conv1D`) as an `Int8Weight`, which runs the op `int8_linear`. Fused experts run the op
   `int8_experts_linear` through transformers' experts interface.
3. Attention, embeddings, the head, routers and norms are not changed: most bytes are in the feed-forward blocks, and rounding harms
   them least. `int8` (`patchkit.patches.int8`) converts attention and the head too.
4. `save_pretrained` writes a torchao checkpoint (`Int8Tensor`), which stock transformers loads. Patching that model takes over the same
   int8 values.
"""

from __future__ import annotations

from dataclasses import dataclass

from patchkit.anatomy.target import Target
from patchkit.definitions import rounded_logits
from patchkit.int8.scheme import Int8Scheme
from patchkit.patch import Facts, Promises, register_patch
from patchkit.quantised.options import QuantisedWeights


@register_patch("mlp_int8")
@dataclass(frozen=True)
class MLPInt8(QuantisedWeights):
    """int8 weights for the linear layers of the feed-forward blocks.

    The options mode, keep_original, modules, min_snr, calibration, strict and view are those of `QuantisedWeights`; mode "dynamic" rounds
    activations per token.

    Raises:
        ValueError: an option out of range.
    """

    facts = Facts(
        goal="fewer bytes per token",
        exact="no: weights are rounded; the signal-to-noise ratio of each module is in the report",
        cost="none at run time; patching times itself, and warns where it is slower. With `keep_original=False` it cannot be undone",
        source="[torchao](https://github.com/pytorch/ao) (format); Dettmers et al. 2022, "
        "[2208.07339](https://arxiv.org/abs/2208.07339) (why not attention)",
    )

    @property
    def scheme(self) -> Int8Scheme:
        return Int8Scheme()

    def promises(self, target: Target) -> Promises:
        return Promises(definition=rounded_logits, rounds=True)

    @classmethod
    def candidates(cls, target: Target) -> list[MLPInt8]:
        return [cls(mode=mode) for mode in ("auto", "dynamic", "weight_only")]
