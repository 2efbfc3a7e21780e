"""The checks of one set of patches: each promise beside the model without that patch, and what every patched model has to keep.

How much two computations may differ is a row of `patchkit.tolerance.TOLERANCES`, in 16 bits three times what the unpatched model differs
from its own weights in float32; or three times what the unpatched model differs from itself in the same test, where that is more; and for
patches that round, three times what their definition differs from itself by its last bits (`bounds`).
"""
