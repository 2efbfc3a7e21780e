"""linear_attention: causal attention through a state of constant size.

Shapes: B batch, H heads, G kv heads (query head h reads kv head h // (H / G)), T tokens, K head dimension, V value dimension,
F = K features.
"""

from patchkit.kernels.linear_attention import backends, definition, gradient, samples  # noqa: F401  (they attach themselves to the op)
from patchkit.kernels.linear_attention.inputs import FEATURE_MAPS, Inputs, check, features
from patchkit.kernels.linear_attention.reference import finished, linear_attention

__all__ = ["FEATURE_MAPS", "Inputs", "check", "features", "finished", "linear_attention"]
