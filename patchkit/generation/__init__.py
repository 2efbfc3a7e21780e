"""Speculative generation: a drafter proposes, the model verifies several tokens in one forward, the text stays the model's own."""

from patchkit.generation.loop import reset_statistics as reset_statistics
from patchkit.generation.loop import statistics_of as statistics_of
