"""Definitions of patches: their logits, computed slowly on an unpatched model, by code that shares nothing with the patches.

Each function has the signature of `patchkit.patch.Definition` once its keyword arguments are bound. It takes a model without the patch
in question, token ids [1, T], and the patch's own report, and returns logits [1, T, V]. The model is hooked meanwhile, and unchanged
afterwards. Functions that take ``at``, ascending positions [P], return logits [1, P, V] of these only, because all logits of a long
sequence do not fit into memory.

Shapes: B batch, H heads, G kv heads, T tokens, K key dimension, D hidden size, V vocabulary, S sinks, W window.
"""

from patchkit.definitions.forward import NoDefinition as NoDefinition
from patchkit.definitions.forward import keeps_some as keeps_some
from patchkit.definitions.forward import logits_at as logits_at
from patchkit.definitions.hybrid import hybrid_logits as hybrid_logits
from patchkit.definitions.memory import memory_logits as memory_logits
from patchkit.definitions.rounded import rounded_logits as rounded_logits
from patchkit.definitions.rounded_in_groups import rounded_in_groups as rounded_in_groups
from patchkit.definitions.window import window_logits as window_logits
