"""Grammars that a generated text must follow: JSON schemas, regular expressions, context-free grammars.

The parser is llguidance (https://github.com/guidance-ai/llguidance), which is optional: `pip install 'patchkit[grammar]'`.
"""

from __future__ import annotations

from patchkit.grammar.processor import Grammar

__all__ = ["Grammar"]
