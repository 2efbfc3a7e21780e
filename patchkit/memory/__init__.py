"""Memory beyond the window: exact keys and values chosen from what leaves it, at constant bytes."""
