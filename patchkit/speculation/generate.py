"""The door of speculative generation: `generate` of a patched model, and which calls go to the stock method."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteriaList, StopStringCriteria

from patchkit import _compat
from patchkit.record import Warnings
from patchkit.speculation.loop import speculate
from patchkit.speculation.refusals import Call, Unserved, refuse_call
from patchkit.speculation.shared import Speculation
from patchkit.training_mode import drops_values, off_policy


def generate(model: Any, speculation: Speculation, *args: Any, **kwargs: Any) -> Any:
    """Run ``model.generate``: speculative where that can be done, else the model's own, with one line in the log."""
    stock = type(model).generate
    given = inspect.signature(stock).bind_partial(model, *args, **kwargs).arguments
    extra = given.get("kwargs", {})
    reason = _why_stock(model, given, extra)
    if model.training and not speculation.acceptance.lossless:
        speculation.warnings.add(off_policy(f"acceptance={speculation.acceptance}"))
    if reason is None:
        streamer = HeldBack(given["streamer"]) if given.get("streamer") is not None else None
        own_cache = _compat.cache_given(extra) is None
        loop = functools.partial(_with_call, functools.partial(speculate, speculation, streamer), own_cache)
        extra = _with_stop_strings(given, extra)
        given = {name: value for name, value in given.items() if name not in ("self", "kwargs", "streamer", "custom_generate")}
        try:
            return stock(model, **given, **extra, streamer=streamer, custom_generate=loop)
        except Unserved as unserved:
            reason = str(unserved)
    speculation.hits["stock calls"] += 1
    speculation.warnings.add(f"generate runs without speculation: it does not serve {reason}")
    return stock(model, *args, **kwargs)


def prepared_call(model: Any, *args: Any, **kwargs: Any) -> Call:
    """Let ``model.generate`` prepare a call, without generating anything.

    Raises:
        Unserved: only the stock method can serve the call.
    """
    given = inspect.signature(type(model).generate).bind_partial(model, *args, **kwargs).arguments
    extra = given.get("kwargs", {})
    reason = "streamer=" if given.get("streamer") is not None else _why_stock(model, given, extra)
    if reason is not None:
        raise Unserved(reason)
    extra = _with_stop_strings(given, extra)
    given = {name: value for name, value in given.items() if name not in ("self", "kwargs", "streamer", "custom_generate")}
    own_cache = _compat.cache_given(extra) is None
    call: Call = type(model).generate(model, **given, **extra, custom_generate=functools.partial(_with_call, _itself, own_cache))
    refuse_call(call, has_streamer=False)
    return call


def _with_call(
    use: Callable[[Call], Any],
    own_cache: bool,
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """Return what ``use`` makes of the call that `generate` has prepared: a `custom_generate` once the first two are bound."""
    return use(Call(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, own_cache))


def _itself(call: Call) -> Call:
    return call


def generate_plainly(model: Any, warnings: Warnings, name: str, *args: Any, **kwargs: Any) -> Any:
    """Run a method of the model that generates without `generate`, and say that it does not draft."""
    warnings.add(f"{name} runs without speculation: call generate for that")
    return getattr(type(model), name)(model, *args, **kwargs)


def _why_stock(model: Any, given: dict[str, Any], extra: dict[str, Any]) -> str | None:
    """The first thing in the arguments of generate that only the stock method can do; None if there is none."""
    for name in ("custom_generate", "assistant_model", "synced_gpus", "negative_prompt_ids"):
        if given.get(name) is not None and given.get(name) is not False:
            return f"{name}="
    for name in ("prompt_lookup_num_tokens", "use_mtp", "position_ids", "trust_remote_code", "token_healing"):
        if extra.get(name) is not None:
            return f"{name}="
    if _compat.is_shared_by_processes(model):
        return "a model whose weights several processes share, which would each choose a K of their own"
    if drops_values(model):
        return "training mode with dropout, where the verification of a draft is another draw"
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
    """Turn stop strings into a criterion in ``given``, because generate hands no tokenizer on to a custom method.

    Returns:
        The other arguments in ``extra``.
    """
    tokenizer, strings = extra.get("tokenizer"), extra.get("stop_strings")
    if tokenizer is None or strings is None:
        return extra
    given["stopping_criteria"] = StoppingCriteriaList([*(given.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)])
    return {name: value for name, value in extra.items() if name not in ("tokenizer", "stop_strings")}


class HeldBack:
    """A streamer that gets nothing before `release`, because the stock method may still have to start from the beginning."""

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
