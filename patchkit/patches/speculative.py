"""Speculative generation: `generate` gives the same text in fewer forwards of the model.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", https://arxiv.org/abs/2211.17192.

A drafter proposes K tokens; one forward of the model over K + 1 tokens says what it would have said after each of them. The
longest prefix that it agrees with stands, and the token after it comes for free. With acceptance a, drafts that cost c and
a verification that costs v forwards, a token takes (K c + v) (1 - a) / (1 - a^(K+1)) forwards instead of one.

Differs from the paper in that deterministic drafts (greedy drafts, prompt lookup, trees) stand if they are what the model draws,
so that a seed gives the same sampled text with and without them; that rows of a batch advance by their own numbers of tokens;
and that K follows from what was measured, 0 included.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteriaList, StopStringCriteria

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.attention import alias_of, has_own_mask, original_name, set_alias
from patchkit.errors import PatchConflict, UnsupportedModel
from patchkit.handle import Handle
from patchkit.patch import Patch, Promises, Stage, register_patch
from patchkit.record import Warnings
from patchkit.speculation.acceptance import Acceptance, acceptance
from patchkit.speculation.cached_model import find_obstacle, takes_any_mask
from patchkit.speculation.controllers import controller, parse_call
from patchkit.speculation.draft_lengths import Controller
from patchkit.speculation.drafter import Drafter
from patchkit.speculation.drafters.chain import Chain
from patchkit.speculation.drafters.draft_model import DraftModel
from patchkit.speculation.drafters.prompt_lookup import PromptLookup
from patchkit.speculation.loop import speculate
from patchkit.speculation.refusals import Unserved
from patchkit.speculation.shared import Speculation, keep_speculation, speculation_of


@register_patch("speculative")
@dataclass(frozen=True)
class Speculative(Patch):
    """Draft, verify, keep what the model would have said itself. `patchkit.speculation.statistics_of(model)` says what came of it.

    Args:
        draft: a `Drafter`; a loaded model (`DraftModel`); the name or path of one; "prompt_lookup", "medusa" or "eagle", with options as
            'eagle("FILE")' of a file that `patchkit train-heads` wrote; or several of these, of which the first that has a proposal
            drafts (`Chain`).
        k: tokens to draft per round: a number, or "fixed(k)", "adaptive(...)" or "cost_model(...)" of `patchkit.speculation.controllers`.
        acceptance: "exact", or by name a policy that changes the text (`patchkit.speculation.acceptance`): "longest_prefix",
            "conf_threshold(tau)", "topk_agree(k)", "typical(p)".

    Raises:
        ValueError, TypeError: an option that names nothing, or out of range.
    """

    stage = Stage.GENERATION
    exact = True
    acts = ("proposed",)
    example = "speculative(k=4)"

    draft: Any = "prompt_lookup"
    k: Any = "cost_model"
    acceptance: Any = "exact"

    def __post_init__(self) -> None:
        self._controller()
        self._acceptance()
        _drafter(self.draft, None)

    def promises(self, target: Target) -> Promises:
        lossless = self._acceptance().lossless
        return Promises(same_logits=True, same_tokens=lossless, greedy=lossless)

    def exercised(self) -> Speculative:
        return dataclasses.replace(self, k=4)  # drafts in every round, whether or not that pays

    @classmethod
    def candidates(cls, target: Target) -> list[Speculative]:
        """Prompt lookup, and for the bundled model what was trained to draft for it."""
        from patchkit.speculation.drafters.eagle import Eagle

        try:
            Eagle(heads="bundled").check(target)
        except UnsupportedModel:
            return [cls()]
        return [cls(), *(cls(draft=draft) for draft in ("eagle", "medusa", "stdlib-1m-draft"))]

    def check(self, target: Target) -> None:
        name = type(target.model).__name__
        obstacle, ragged = find_obstacle(target.model)
        if obstacle is not None:
            raise UnsupportedModel(f"{name} cannot verify drafts exactly: {obstacle}")
        if getattr(target.model.generate, "__func__", None) is not type(target.model).generate:
            raise PatchConflict(f"this {name} has a generate of its own, which speculative would hide: remove it first")
        devices = {str(parameter.device) for parameter in target.model.parameters()}
        if len(devices) > 1:
            raise UnsupportedModel(f"{name} is spread over {', '.join(sorted(devices))}: speculative needs all of it on one device")
        drafter = _drafter(self.draft, target)
        assert drafter is not None
        drafter.check(target)
        target.views[id(self)] = drafter, ragged

    def apply(self, target: Target, handle: Handle) -> None:
        drafter, ragged = target.views.pop(id(self))
        prepared, control = drafter.prepared(target), self._controller().begin()
        configs = _compat.attention_configs(target.model)
        # Masks for each row come through the alias. It stays, because to put it there for a forward would disturb other threads.
        aliased = sorted({original_name(config) for config in configs}) if ragged and takes_any_mask(configs) else []
        speculation = Speculation(
            prepared,
            str(drafter),
            self._acceptance(),
            control,
            ragged,
            handle.record.hits,
            handle.record.warnings,
            tuple(aliased),
            compiled=any(patch.stage is Stage.COMPILE for patch in target.patches),
        )
        for config in configs if aliased else []:
            if not has_own_mask(config):  # that of an attention patch must stay
                set_alias(handle, config, alias_of(original_name(config)))
        for module in (target.model, target.decoder):
            keep_speculation(handle, module, speculation)
        handle.hook(target.decoder, _keep_hidden)
        handle.set_attribute(target.model, "generate", functools.partial(_generate, target.model, speculation))
        for name in _compat.continuous_batching(target.model):
            if name in vars(target.model):  # streaming refuses it, which must stand
                continue
            handle.set_attribute(target.model, name, functools.partial(_unspeculated, target.model, handle.record.warnings, name))
        handle.record.changed("generate methods")
        handle.record.note("drafts", str(drafter))
        if not speculation.acceptance.lossless:
            handle.record.warn(f"acceptance={speculation.acceptance} changes the text")

    def _controller(self) -> Controller:
        return controller(self.k)

    def _acceptance(self) -> Acceptance:
        return acceptance(self.acceptance)


def _drafter(draft: Any, target: Target | None) -> Drafter | None:
    """What ``draft`` stands for; without a target, None where that would load a model."""
    if isinstance(draft, Drafter):
        return draft
    if isinstance(draft, str):
        return _named_drafter(draft, target)
    if isinstance(draft, list | tuple):
        drafters = [_drafter(each, target) for each in draft]
        return None if None in drafters and target is None else Chain(tuple(each for each in drafters if each is not None))
    if isinstance(draft, nn.Module):
        return DraftModel(draft)
    raise TypeError(f"draft={draft!r}: give a drafter, a loaded model, a name or path, or a list of these")


def _named_drafter(name: str, target: Target | None) -> Drafter | None:
    if name.rstrip().endswith(")"):
        from patchkit.speculation.drafters.eagle import Eagle
        from patchkit.speculation.drafters.medusa import Medusa

        drafter: Drafter = parse_call(name, {"prompt_lookup": PromptLookup, "medusa": Medusa, "eagle": Eagle}, "draft")
        return drafter
    if name == "prompt_lookup":
        return PromptLookup()
    if name == "medusa":
        from patchkit.speculation.drafters.medusa import Medusa

        return Medusa(heads="bundled")
    if name == "eagle":
        from patchkit.speculation.drafters.eagle import Eagle

        return Eagle(heads="bundled")
    if target is None:
        return None
    from patchkit.models import load_model

    return DraftModel(load_model(name, target.model.dtype)[0].to(target.model.device))


def _keep_hidden(decoder: nn.Module, args: Any, output: Any) -> None:
    speculation = speculation_of(decoder)
    if speculation.watching:
        speculation.hidden = output[0]


# -- generate --------------------------------------------------------------------------------------------------------------


def _generate(model: Any, speculation: Speculation, *args: Any, **kwargs: Any) -> Any:
    """``model.generate``: speculative where that can be done, else the model's own, with one line in the log."""
    stock = type(model).generate
    given = inspect.signature(stock).bind_partial(model, *args, **kwargs).arguments
    extra = given.get("kwargs", {})
    reason = _why_stock(model, given, extra)
    if reason is None:
        streamer = _HeldBack(given["streamer"]) if given.get("streamer") is not None else None
        own_cache = _compat.cache_given(extra) is None
        loop = functools.partial(speculate, speculation, streamer, own_cache)
        extra = _with_stop_strings(given, extra)
        given = {name: value for name, value in given.items() if name not in ("self", "kwargs", "streamer", "custom_generate")}
        try:
            return stock(model, **given, **extra, streamer=streamer, custom_generate=loop)
        except Unserved as unserved:
            reason = str(unserved)
    speculation.hits["stock calls"] += 1
    speculation.warnings.add(f"generate runs without speculation: it does not serve {reason}")
    return stock(model, *args, **kwargs)


def _unspeculated(model: Any, warnings: Warnings, name: str, *args: Any, **kwargs: Any) -> Any:
    """A method of the model's that generates in a way of its own."""
    warnings.add(f"{name} runs without speculation: call generate for that")
    return getattr(type(model), name)(model, *args, **kwargs)


def _why_stock(model: Any, given: dict[str, Any], extra: dict[str, Any]) -> str | None:
    """What in the arguments of generate only the stock method can do."""
    for name in ("custom_generate", "assistant_model", "synced_gpus", "negative_prompt_ids"):
        if given.get(name) is not None and given.get(name) is not False:
            return f"{name}="
    for name in ("prompt_lookup_num_tokens", "use_mtp", "position_ids", "trust_remote_code", "token_healing"):
        if extra.get(name) is not None:
            return f"{name}="
    if _compat.is_shared_by_processes(model):
        return "a model whose weights several processes share, which would each choose a K of their own"
    if model.device.type == "meta":
        return "weights that accelerate has moved away, to be loaded layer by layer"
    if not str(getattr(model.prepare_inputs_for_generation, "__module__", "")).startswith("transformers."):
        return "a prepare_inputs_for_generation that is not transformers' own (PEFT's prompt tuning, say)"
    if _compat.has_adapters_by_row(model):
        return "adapter_names=, which chooses an adapter for each row"
    configs = [given.get("generation_config"), model.generation_config]
    if extra.get("stop_strings") is None and any(getattr(config, "stop_strings", None) is not None for config in configs):
        return "stop_strings of a generation_config (give them to generate)"
    if extra.get("cache_implementation") not in (None, "dynamic"):
        return f"cache_implementation={extra['cache_implementation']!r}"
    return None


def _with_stop_strings(given: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """generate hands no tokenizer on to a method of ours, so stop strings become a criterion here; the other arguments."""
    tokenizer, strings = extra.get("tokenizer"), extra.get("stop_strings")
    if tokenizer is None or strings is None:
        return extra
    given["stopping_criteria"] = StoppingCriteriaList([*(given.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)])
    return {name: value for name, value in extra.items() if name not in ("tokenizer", "stop_strings")}


class _HeldBack:
    """A streamer that gets nothing before `release`: the stock method may still have to start from the beginning."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.released = streamer, False
        self.waiting: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        if self.released:
            self.streamer.put(value)
        else:
            self.waiting.append(value)

    def end(self) -> None:
        self.streamer.end()

    def release(self) -> None:
        """Hand over what has come so far, and from now on everything at once."""
        self.released = True
        for value in self.waiting:
            self.streamer.put(value)
        self.waiting.clear()
