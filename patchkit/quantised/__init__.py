"""Weights of few bits: the blocks of a model that patches quantise, whatever the number of bits."""
