"""Checks of one set of patches: each promise compared with the model without that patch, and what every patched model has to keep.

`bounds` says how much two computations may differ.
"""
