"""Checks of one set of patches: each promise compared with the model without that patch, and what every patched model has to keep.

`bounds` defines how much two computations may differ.
"""
