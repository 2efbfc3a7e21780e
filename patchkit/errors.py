"""Errors of patchkit. Every message ends with the remedy, so that a user can continue without reading the source."""

from __future__ import annotations


class PatchError(Exception):
    """Base of every error that patchkit raises on purpose."""


class UnsupportedModel(PatchError):
    """This model (or this version of transformers or torch) cannot be patched exactly or usefully; the message says why."""


class DraftError(UnsupportedModel):
    """A draft model does not go with its target: other tokens, and no tokenizers to translate them."""


class NothingMatched(PatchError):
    """A patch found nothing in the model that it could change."""


class PatchConflict(PatchError):
    """A patch is given twice, does not go with another one, or the model is not in the state that the call needs."""


class IrreversiblePatch(PatchError):
    """An edit could not be undone; the message names what is left and how to get a clean model."""


class SpecError(PatchError, ValueError):
    """A spec string names an unknown patch or option, or gives a value that the patch refuses."""


class StreamError(PatchError, RuntimeError):
    """A patched model is run in a mode that its patch cannot serve: a foreign cache, packed positions and the like."""


class StaleWeights(PatchError, RuntimeError):
    """The weights of a patched model have changed, and what a patch has derived from them cannot follow."""


class GrammarError(PatchError, ValueError):
    """A grammar does not read, has no texts, does not fit the tokenizer or the model, or its parser met a limit."""


class RewardError(PatchError, ValueError):
    """A verdict on a text cannot be trusted, or a ledger of verdicts or its key cannot be used. No reward comes of it, not even 0."""


class KernelError(PatchError):
    """No backend of an op, or not the requested one, can serve a call."""


class SlowerPatch(PatchError):
    """A strict patch would slow this model down on this machine."""
