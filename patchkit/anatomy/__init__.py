"""The anatomy of a model, found by running it: which layers attend, how they rotate, where the feed-forward blocks are."""
