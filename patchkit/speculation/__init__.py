"""Speculative generation: a drafter proposes tokens, and the model verifies several in one forward, without a change of its output.

What a user of `Speculative` needs is here: drafters, acceptance policies, controllers of the number of drafts, and statistics; and
what a drafter of your own is made of, `Drafter`, `Session`, `State` and `Proposal`.
"""

from patchkit.speculation.acceptance import Acceptance as Acceptance
from patchkit.speculation.acceptance.conf_threshold import ConfThreshold as ConfThreshold
from patchkit.speculation.acceptance.exact import Exact as Exact
from patchkit.speculation.acceptance.longest_prefix import LongestPrefix as LongestPrefix
from patchkit.speculation.acceptance.topk_agree import TopKAgree as TopKAgree
from patchkit.speculation.acceptance.typical import Typical as Typical
from patchkit.speculation.controllers import Controller as Controller
from patchkit.speculation.controllers.adaptive import Adaptive as Adaptive
from patchkit.speculation.controllers.cost_model import CostModel as CostModel
from patchkit.speculation.controllers.fixed import Fixed as Fixed
from patchkit.speculation.drafter import Drafter as Drafter
from patchkit.speculation.drafter import Proposal as Proposal
from patchkit.speculation.drafter import Session as Session
from patchkit.speculation.drafter import State as State
from patchkit.speculation.drafters.chain import Chain as Chain
from patchkit.speculation.drafters.draft_model import DraftModel as DraftModel
from patchkit.speculation.drafters.eagle import Eagle as Eagle
from patchkit.speculation.drafters.medusa import Medusa as Medusa
from patchkit.speculation.drafters.prompt_lookup import PromptLookup as PromptLookup
from patchkit.speculation.drafters.self_draft import SelfDraft as SelfDraft
from patchkit.speculation.heads import load_heads as load_heads
from patchkit.speculation.row import Row as Row
from patchkit.speculation.scheduler import Scheduler as Scheduler
from patchkit.speculation.shared import reset_statistics as reset_statistics
from patchkit.speculation.shared import statistics_of as statistics_of
