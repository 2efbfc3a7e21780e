"""The state of a batch of sequences that all layers of one cache share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from patchkit.errors import StreamError
from patchkit.prefix.written_state import part_of_state
from patchkit.static_step import StepCache, StepLayer
from patchkit.streaming.rule import ForwardContext, LayerRule, Plan


class KeptLayer(Protocol):
    """The part of a cache layer's interface that its stream uses."""

    rule: LayerRule
    keys: Any
    is_initialized: bool

    @property
    def kv_dtype(self) -> torch.dtype: ...

    def rotate_window(self, cos: torch.Tensor, sin: torch.Tensor) -> None: ...
    def before_fixed_step(self, context: ForwardContext) -> None: ...
    def as_step_layer(self) -> StepLayer: ...


@part_of_state
class Stream:
    """The state of a batch of sequences that all layers of one cache share: tokens seen, padding, base, the forward in progress."""

    made_when_wanted = ("_fixed_tensors", "step")

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.recording = False
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.seen = 0
        self.highest = 0  # the most tokens ever seen, before rollbacks
        self.recorded_since = 0
        self.pads: torch.Tensor | None = None
        self.most_pads = 0
        self.pad_list: tuple[int, ...] = (0,)  # of `pads`, as plain numbers: steps must not read tensor values
        self.base = torch.zeros(1, dtype=torch.int64)
        self.rebase_at = self.plan.limit
        self.context: ForwardContext | None = None
        self.broken = False
        self.in_inference = False  # a forward ran in inference mode, whose tensors can be written to there only
        self.must_read_mask = False  # a row has not begun yet, or ended in padding: the next mask must be read again
        self._fixed_tensors: dict[int, list[Any]] = {}
        self.step: StepCache | None = None  # made when first wanted, dropped when a tensor in it is replaced

    def set_pads(self, pads: torch.Tensor) -> None:
        """Set the left padding [B] int64 of every row."""
        self.pads, self.pad_list = pads, tuple(pads.tolist())
        self.most_pads = max(self.pad_list)
        self._schedule_rebase()

    def begin(self, tokens: int, layers: Sequence[KeptLayer], device: torch.device, in_place: bool, batch: int = 1) -> ForwardContext:
        """Open the context of a forward of ``tokens`` new tokens in each of ``batch`` rows.

        Args:
            layers: of the cache; their keys are rotated when the base moves.
            in_place: no gradient is wanted, so that one token can be written into the buffers in place.

        Raises:
            StreamError: an earlier forward did not reach its end.
        """
        if self.broken:
            raise StreamError("an earlier forward with this cache failed half-way, so its contents are not defined. Start a new cache.")
        self.broken = True  # until this forward commits
        self.in_inference = self.in_inference or torch.is_inference_mode_enabled()
        self.base = self.base.to(device)
        in_blocks = tokens > 1 or not in_place
        if not in_blocks and self.rebase_at is not None and self.plan.limit is not None and self.seen >= self.rebase_at:
            rows, base = self._rows_and_base()
            due = (rows - base >= self.plan.limit) & (rows >= self.plan.main.reach)
            self.rebase(torch.where(due, rows, base), layers)
        rules = self.rules
        filled = self.pads is None or self.seen >= self.most_pads + max(rule.capacity for rule in rules)
        sees_every_slot = not in_blocks and filled and all(rule.sees_all for rule in rules)
        self.context = ForwardContext(
            self.plan,
            self.seen,
            tokens,
            self.pads,
            self.base,
            device,
            in_blocks=in_blocks,
            sees_every_slot=sees_every_slot,
            rows=batch,
            most_pads=self.most_pads,
            pad_list=self.pad_list,
            highest=max(self.highest, self.seen),
        )
        if not in_blocks and self.seen >= min(rule.full_from for rule in rules):
            self._prepare_step(self.context)
        return self.context

    def commit(self) -> None:
        """Count the tokens of the forward as seen, after it has gone through every layer."""
        assert self.context is not None
        self.seen = self.context.end
        self.highest = max(self.highest, self.seen)
        self.context = None
        self.broken = False

    def rebase(self, base: torch.Tensor, layers: Sequence[KeptLayer]) -> None:
        """Move the base to ``base`` [B or 1] and rotate every window key by the difference."""
        offsets = (self.base - base)[:, None, None]
        for rule in self.rules:
            if rule.rotary is not None:
                cos, sin = rule.rotary.angles(offsets)
                for layer in layers:
                    if layer.rule is rule:
                        layer.rotate_window(cos, sin)
        self.base = base
        self._schedule_rebase()

    def set_bases(self, rows: torch.Tensor, base: torch.Tensor) -> None:
        """Set the bases [n] of the batch rows [n], whose keys have been replaced by keys at these bounded positions."""
        if self.pads is None:
            self.base = base[:1].to(self.base.device)
        else:
            moved = self.base.expand(len(self.pads)).clone()
            moved[rows] = base.to(moved.device)
            self.base = moved
        self._schedule_rebase()

    def roll_back(self, count: int, layers: Sequence[KeptLayer]) -> None:
        """Count the last ``count`` tokens as not seen. A base that lies beyond its row moves back, to 0 where the cache is not full."""
        self.seen -= count
        rows, base = self._rows_and_base()
        back = torch.where(rows < self.plan.main.reach, 0, torch.minimum(base, rows))
        if bool((back != base).any()):
            self.rebase(back, layers)

    @property
    def rules(self) -> list[LayerRule]:
        """The distinct rules of the plan."""
        return list({id(rule): rule for rule in self.plan.rules.values()}.values())

    def _rows_and_base(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The row position [B or 1] of the next token, and the base [B or 1]."""
        rows = torch.full_like(self.base, self.seen) if self.pads is None else self.seen - self.pads
        return rows, self.base.expand(len(rows))

    def _schedule_rebase(self) -> None:
        """Compute, as a plain number, the first token at which a row's positions leave their bound: steps must not read tensor values."""
        if self.plan.limit is not None:
            origin = self.base if self.pads is None else self.base + self.pads.to(self.base.device)
            self.rebase_at = int(origin.min()) + self.plan.limit

    def _prepare_step(self, context: ForwardContext) -> None:
        """Write the `LayerRule.step_tensors` of every rule into tensors whose addresses stay the same."""
        for rule in self.rules:
            fresh, held = rule.step_tensors(context), self._fixed_tensors.get(id(rule))
            if held is None or any(_layout(kept) != _layout(new) for kept, new in zip(held, fresh, strict=True)):
                self._fixed_tensors[id(rule)] = fresh
                self.step = None
                continue
            for kept, new in zip(held, fresh, strict=True):
                if kept is not None and new is not None:
                    kept.copy_(new)

    def fixed_tensors(self, rule: LayerRule) -> list[Any]:
        """The `LayerRule.step_tensors` of this step, in tensors at fixed addresses."""
        return self._fixed_tensors[id(rule)]

    def select_rows(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply ``index``, a selection of batch rows, to every tensor with one."""
        if self.pads is not None:
            self.pads = index(self.pads)
            self.pad_list = tuple(self.pads.tolist())
        if len(self.base) > 1:
            self.base = index(self.base)
        self._fixed_tensors = {}
        self.step = None

    def fixed_step(self, layers: Sequence[KeptLayer]) -> StepCache | None:
        """The cache that compiled code works on in this step; None where the step has to run eagerly."""
        context, rules = self.context, self.rules
        if context is None or context.in_blocks or not all(layer.is_initialized for layer in layers):
            return None
        if any(context.start < rule.sinks for rule in rules):  # a compiled step rewrites all sinks, so all must be there
            return None
        if context.start < min(rule.full_from for rule in rules):
            self._prepare_step(context)
        for layer in layers:
            layer.before_fixed_step(context)
        if self.step is None:
            first = [next(layer for layer in layers if layer.rule is rule) for rule in rules]
            rows = 1 if self.pads is None else len(self.pads)
            masks = [torch.zeros(rows, 1, 1, layer.rule.capacity, dtype=layer.kv_dtype, device=layer.keys.device) for layer in first]
            self.step = StepCache(
                [layer.as_step_layer() for layer in layers], torch.zeros((), dtype=torch.int64, device=context.device), masks
            )
        self.step.seen.fill_(context.start)
        self._write_masks(context, rules, self.step)
        return self.step

    def _write_masks(self, context: ForwardContext, rules: list[LayerRule], step: StepCache) -> None:
        """Write the masks of this step: 0 where a slot is visible, and the lowest number of the dtype elsewhere."""
        full = context.sees_every_slot and context.end >= max(rule.capacity for rule in rules)
        if full and step.masks_open:
            return
        query = torch.tensor([context.start], device=context.device)
        for rule, mask in zip(rules, step.masks, strict=True):
            keys = context.key_tokens(rule) if context.start >= rule.capacity else torch.arange(rule.capacity, device=context.device)[None]
            mask.zero_().masked_fill_(~context.visible(rule, query, keys), torch.finfo(mask.dtype).min)
        step.masks_open = full


def _layout(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.device)
