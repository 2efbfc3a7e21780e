"""Quantised checkpoints of every library that transformers loads on a CPU, under every patch."""
