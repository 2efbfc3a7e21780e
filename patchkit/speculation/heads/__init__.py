"""Heads that draft from a model's last hidden states: `MedusaHeads` and `EagleHead`, and their files.

Heads use the model's LM head and embeddings, so a file holds little more than a layer. It names the model it was trained
for, by sizes and by samples of every weight, and is refused for any other.
"""

from patchkit.speculation.heads.base import Heads as Heads
from patchkit.speculation.heads.base import Init as Init
from patchkit.speculation.heads.eagle import EagleHead as EagleHead
from patchkit.speculation.heads.eagle import KeyValues as KeyValues
from patchkit.speculation.heads.files import heads_for as heads_for
from patchkit.speculation.heads.files import load_heads as load_heads
from patchkit.speculation.heads.medusa import MedusaHeads as MedusaHeads
from patchkit.trained_for import TrainedFor as TrainedFor
