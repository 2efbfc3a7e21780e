"""Search: sweeps over specs, draft lengths, and the fastest spec within a bound on quality."""
