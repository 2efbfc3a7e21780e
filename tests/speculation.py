"""What tests of speculation share: greedy texts, and drafters with a known answer (always wrong, always right, silent, a tree)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from patchkit import patch_model
from patchkit.speculation.drafter import Drafter, Proposal, Session, State
from patchkit.testing import tiny_model

# New tokens: of the bar, and of its smaller sibling, in which windows of 6 to 16 tokens have passed several times.
NEW, FEW = 200, 52


def text_of(model: PreTrainedModel, batch: int, new: int = NEW, **options: Any) -> torch.Tensor:
    """Greedy text after prompts of 12 tokens, some of them left-padded; half of the rows end early where an end is given."""
    ids = torch.randint(3, 128, (batch, 12), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 5, 1, 0)[:batch]):
        ids[row, :pads], mask[row, :pads] = 0, 0
    given = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    return model.generate(input_ids=ids, attention_mask=mask, **given)


@functools.cache
def plain_text(family: str, batch: int, streaming: bool = False, new: int = NEW) -> torch.Tensor:
    """What plain decoding gives, [B, 12 + new]."""
    model = tiny_model(family)
    return text_of(patch_model(model, "streaming(sinks=2, window=10)", verbose=False) if streaming else model, batch, new)


Rule = Callable[[State, int, int], int]  # state, row, index of the token in the row's buffer -> token


@dataclass(frozen=True, eq=False)
class Scripted(Drafter):
    """Proposes what ``rule`` says."""

    rule: Rule

    def begin(self, model: Any, state: State) -> Session:
        return _ScriptedSession(self.rule)


class _ScriptedSession(Session):
    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def propose(self, state: State, k: int) -> Proposal | None:
        tokens = [[self.rule(state, row, length + i) for i in range(k)] for row, length in enumerate(state.lengths)]
        return Proposal(torch.tensor(tokens), [k] * state.rows)


class Silent(Drafter):
    """Never proposes anything."""

    def begin(self, model: Any, state: State) -> Session:
        return _SilentSession()


class _SilentSession(Session):
    def propose(self, state: State, k: int) -> Proposal | None:
        return None


def told(text: torch.Tensor, shift: int = 0) -> Scripted:
    """Knows the whole batch [B, L] that plain decoding gives, and says its tokens, or with ``shift`` always other ones."""

    def rule(state: State, row: int, index: int) -> int:
        # Rows are recognised by their prompts, because finished ones leave.
        prompt = state.tokens[row, :8].tolist()
        batch_row = next(r for r in range(len(text)) if text[r, :8].tolist() == prompt)
        known = int(text[batch_row, index]) if index < text.shape[1] else 3
        return (known + shift) % 128

    return Scripted(rule)


def always(token: int) -> Scripted:
    """Says the same token every time."""
    return Scripted(lambda state, row, index: token)


@dataclass(frozen=True, eq=False)
class Bush(Drafter):
    """A tree: the told text, with a wrong sibling before every node."""

    text: torch.Tensor

    def begin(self, model: Any, state: State) -> Session:
        return _BushSession(told(self.text).rule)


class _BushSession(Session):
    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def propose(self, state: State, k: int) -> Proposal | None:
        right = [[self.rule(state, row, length + i) for i in range((k + 1) // 2)] for row, length in enumerate(state.lengths)]
        tokens, parents, trunk = [[] for _ in right], [], -1
        for depth in range(len(right[0])):
            for row, texts in enumerate(right):
                tokens[row] += [(texts[depth] + 1) % 128, texts[depth]]
            parents += [trunk, trunk]
            trunk = len(parents) - 1
        return Proposal(torch.tensor(tokens), [len(parents)] * state.rows, parents=tuple(parents))
