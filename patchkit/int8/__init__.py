"""int8 weights: the tensor that stands for a quantised weight."""
