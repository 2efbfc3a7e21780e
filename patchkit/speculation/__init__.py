"""Speculative generation: a drafter proposes, the model verifies several tokens in one forward, the text stays the model's own."""

from patchkit.speculation.shared import reset_statistics as reset_statistics
from patchkit.speculation.shared import statistics_of as statistics_of
