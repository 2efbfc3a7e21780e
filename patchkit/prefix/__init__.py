"""A cache of prompts across calls of `generate`, exact to the bit: what the patch `prefix_cache` puts on a model."""

from __future__ import annotations

from patchkit.prefix.shared import PrefixStatistics as PrefixStatistics
from patchkit.prefix.shared import clear_prefix_cache as clear_prefix_cache
from patchkit.prefix.shared import pin as pin
from patchkit.prefix.shared import prefix_statistics as prefix_statistics
from patchkit.prefix.shared import salted as salted
