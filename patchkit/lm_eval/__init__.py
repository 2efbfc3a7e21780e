"""lm-evaluation-harness: patched models in it, and tasks that need no network."""
