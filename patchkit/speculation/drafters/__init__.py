"""Drafters, one per file. `Drafter` and `Session` are in `patchkit.speculation.drafter`."""
