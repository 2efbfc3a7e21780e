"""StreamingLLM: the rule of each layer, positions inside the cache, the ring of keys and values, and what is done about evicted tokens."""
