"""Cache layers: all state that a patch keeps while decoding."""
