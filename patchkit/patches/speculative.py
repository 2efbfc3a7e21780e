"""Speculative generation: `generate` gives the same text in fewer forwards of the model.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", https://arxiv.org/abs/2211.17192.

A drafter proposes K tokens; one forward of the model over K + 1 tokens gives its own choice after each of them. The longest prefix of
drafts that the policy accepts becomes part of the text, and the model's own token after it comes without another forward. With
acceptance a, drafts that cost c and a verification that costs v forwards, a token takes

    (K c + v) (1 - a) / (1 - a^(K+1))

forwards instead of one.

Differs from the paper in that

* deterministic drafts (greedy drafts, prompt lookup, trees) are accepted if they are what the model draws, so that a seed gives the same
  sampled text with and without them,
* rows of a batch advance by their own numbers of tokens,
* and K follows from measured costs and acceptance, 0 included.

What it does to a model: `patchkit.speculation.install`. The loop: `patchkit.speculation.loop`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from patchkit.anatomy.target import Target
from patchkit.errors import UnsupportedModel
from patchkit.handle import Handle
from patchkit.patch import Facts, Patch, Promises, Stage, register_patch
from patchkit.speculation.acceptance import Acceptance, acceptance
from patchkit.speculation.acceptance.exact import Exact
from patchkit.speculation.controllers import Controller
from patchkit.speculation.controllers.cost_model import CostModel
from patchkit.speculation.drafter import Drafter
from patchkit.speculation.drafters.eagle import Eagle
from patchkit.speculation.drafters.prompt_lookup import PromptLookup
from patchkit.speculation.drafters.self_draft import SelfDraft
from patchkit.speculation.drafts import drafter_of, read_draft
from patchkit.speculation.install import check_target, install
from patchkit.speculation.read_controller import read_controller


@register_patch("speculative")
@dataclass(frozen=True)
class Speculative(Patch):
    """Draft several tokens, verify them in one forward, and keep what the model would have chosen itself.

    `patchkit.speculation.statistics_of(model)` gives what the last calls did. Each option takes an object, or its spec string:
    `speculative(draft=eagle, k=adaptive(target=0.7), acceptance=topk_agree(2))`.

    Args:
        draft: a `Drafter`; a loaded model (`DraftModel`); the name or path of one; "prompt_lookup", "medusa" or "eagle", with options as
            'eagle("FILE")' of a file that `patchkit train-heads` wrote; or several of these, of which the first that has a proposal
            drafts (`Chain`).
        k: tokens to draft per round: a number, or "fixed(k)", "adaptive(...)" or "cost_model(...)" (`patchkit.speculation.controllers`).
        acceptance: "exact", or a policy that changes the text (`patchkit.speculation.acceptance`): "longest_prefix",
            "conf_threshold(tau)", "topk_agree(k)", "typical(p)".

    Raises:
        ValueError, TypeError: an option that names nothing, or out of range.
    """

    stage = Stage.GENERATION
    exact = True
    acts = ("proposed",)
    example = evaluated = "speculative(k=4)"
    facts = Facts(
        goal="the same text from `generate`, faster: drafted by prompt lookup, a smaller model, EAGLE or Medusa heads, or a patched view",
        exact="yes: the same greedy text in fp32, the same distribution when sampling; not under a lossy `acceptance`",
        cost="measures itself: plain steps where drafting does not pay",
        source="Leviathan et al. 2023, [2211.17192](https://arxiv.org/abs/2211.17192)",
    )

    draft: Any = field(default=PromptLookup(), metadata={"objects": Drafter.available, "words": True})
    k: Any = field(default=CostModel(), metadata={"objects": Controller.available})
    acceptance: Any = field(default=Exact(), metadata={"objects": Acceptance.available})

    def __post_init__(self) -> None:
        object.__setattr__(self, "draft", read_draft(self.draft))
        object.__setattr__(self, "k", read_controller(self.k))
        object.__setattr__(self, "acceptance", acceptance(self.acceptance))

    def promises(self, target: Target) -> Promises:
        lossless = self.acceptance.lossless
        return Promises(same_logits=True, same_tokens=lossless, greedy=lossless)

    def exercised(self) -> Speculative:
        return dataclasses.replace(self, k=4)  # drafts in every round, whether or not that pays

    @classmethod
    def candidates(cls, target: Target) -> list[Speculative]:
        """Prompt lookup, and for the bundled model what was trained to draft for it."""
        try:
            Eagle(heads="bundled").check(target)
        except UnsupportedModel:
            return [cls()]
        return [cls(), *(cls(draft=draft) for draft in ("eagle", "medusa", "stdlib-1m-draft"))]

    @classmethod
    def drafting(cls, patches: tuple[Patch, ...]) -> Speculative:
        """The patched model drafts, and the model itself verifies."""
        return cls(draft=SelfDraft(patches))

    def check(self, target: Target) -> None:
        ragged = check_target(target)
        drafter = drafter_of(self.draft, target)
        drafter.check(target)
        target.views[id(self)] = drafter, ragged

    def apply(self, target: Target, handle: Handle) -> None:
        drafter, ragged = target.views.pop(id(self))
        install(target, handle, drafter, self.k, self.acceptance, ragged)
