"""Measurements: perplexity, latency, recall, profiles, and the machine they were taken on."""
