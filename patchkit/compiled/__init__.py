"""Compiled decoding: steps whose shapes and addresses never change, and the caches that hand them out."""
