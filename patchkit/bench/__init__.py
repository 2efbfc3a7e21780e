"""Benchmark of text generation, here or on a server."""
