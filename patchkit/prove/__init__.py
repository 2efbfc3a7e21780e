"""Proof: checks of what a patch promises, on the model that it is applied to."""
