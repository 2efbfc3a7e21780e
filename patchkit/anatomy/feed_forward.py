"""Search for the feed-forward blocks of the decoder's layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.layers import FeedForward, Subject
from patchkit.anatomy.probe import PROBE_TOKENS, probe_tokens
from patchkit.errors import UnsupportedModel
from patchkit.views import evaluating

# Where no cache can be watched, a module is a token mixer if its name matches this.
_MIXER_WORDS = re.compile(r"att|mixer|mamba|time_mix|temporal|recurrent|lstm|ssm|conv", re.IGNORECASE)

# Next to the feed-forward block: routers and norms that are networks themselves, per-layer embeddings, low-rank residuals,
# mixtures of residual streams.
_AUXILIARY = re.compile(r"^(gate|.*router.*|.*norm|altup|laurel|ple|per_layer.*|.*hyper_connection)$")

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def find_feed_forward(target: Subject) -> FeedForward:
    """Find every linear layer of a decoder layer that is neither in a token mixer nor a router.

    * A token mixer is a module that reads or writes the cache in a probe.
    * A decoder layer is an item of a list of modules of which at least one holds a mixer.
    * A router is a linear layer with at most two outputs more than there are experts.
    * Small linear layers next to the block (`_AUXILIARY`) do not count.

    Raises:
        UnsupportedModel: the model cannot be probed.
    """
    model = target.model
    names = {module: name for name, module in model.named_modules()}
    mixers, watched = _token_mixers(target)
    layers = [
        layer
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList) and any(module in mixers for layer in stack for module in layer.modules())
        for layer in stack
    ]
    inner = {module for layer in layers for module in layer.modules() if module is not layer}
    layers = [layer for layer in dict.fromkeys(layers) if layer not in inner]
    experts_here = max(_expert_counts(target.config), default=0)
    found = FeedForward({}, {}, {})
    for layer in layers:
        for path, module in _outside(layer, mixers, watched):
            name = f"{names[layer]}.{path}" if path else names[layer]
            stacked = [key for key, weight in module.named_parameters(recurse=False) if weight.ndim == 3 and min(weight.shape) > 1]
            if isinstance(module, nn.Linear | _compat.Conv1D):
                outputs = module.weight.shape[0] if isinstance(module, nn.Linear) else module.weight.shape[1]
                if outputs > max(experts_here, 1) + 2:
                    found.linears[name] = module
            elif _compat.on_experts_interface(module):
                found.experts[name] = module
            elif stacked and not isinstance(module, nn.Conv1d):
                found.left_alone[name] = f"its 3-D weights ({', '.join(stacked)}) do not go through transformers' experts interface"
    return found


def _expert_counts(config: Any) -> Iterator[int]:
    """Yield every number of experts in a config and in the configs inside it."""
    for name, value in vars(config).items():
        if name in _EXPERT_COUNTS and isinstance(value, int):
            yield value
        elif isinstance(value, _compat.PreTrainedConfig):
            yield from _expert_counts(value)


def _outside(layer: nn.Module, mixers: set[nn.Module], watched: bool) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module under ``layer`` with its path, except token mixers, modules in them, and wrappers around them."""
    parents = {child: (module, name) for module in layer.modules() for name, child in module.named_children()}
    cut = set()
    for mixer in mixers & set(layer.modules()):
        # A wrapper such as BERT's `attention`, which holds `self` and `output`, belongs to the mixer.
        while mixer in parents and parents[mixer][0] in parents and "att" in parents[parents[mixer][0]][1].lower():
            mixer = parents[mixer][0]
        cut.add(mixer)

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        own_name = path.rpartition(".")[2]
        if module in cut or _AUXILIARY.match(own_name) or (path and _is_attention(module, own_name, watched)):
            return
        yield path, module
        for name, child in module.named_children():
            # Of a LoRA layer, only the base; adapters are trained and small.
            if hasattr(module, "base_layer") and name != "base_layer":
                continue
            yield from walk(child, f"{path}.{name}" if path else name)

    return walk(layer, "")


def _is_attention(module: nn.Module, name: str, watched: bool) -> bool:
    # Cross-attention may not touch the cache in the probe.
    return type(module).__name__.endswith("Attention") or "attn" in name.lower() or (not watched and bool(_MIXER_WORDS.search(name)))


def _token_mixers(target: Subject) -> tuple[set[nn.Module], bool]:
    """Return the innermost modules that use the cache, and whether there was a cache to watch.

    Without one, return every module whose name matches `_MIXER_WORDS`.
    """
    model = target.model
    by_name = {module for name, module in model.named_modules() if _MIXER_WORDS.search(name.rpartition(".")[2])}
    if not _compat.supports_dynamic_cache(model):
        return by_name, False
    cache = _compat.DynamicCache(config=target.config)
    running: list[nn.Module] = []
    mixers: set[nn.Module] = set()

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    def watch(method: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if running:
                mixers.add(running[-1])
            return method(*args, **kwargs)

        return watched

    for name in dir(cache):
        if name.startswith("update") or name in ("get_conv_state", "get_recurrent_state", "has_previous_state"):
            setattr(cache, name, watch(getattr(cache, name)))
    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in model.modules()]
    try:
        with evaluating(model), torch.no_grad():
            model(input_ids=probe_tokens(target)[:1], use_cache=True, **{_compat.CACHE: cache})
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} failed on a probe of {PROBE_TOKENS} tokens ({type(error).__name__}: {error}). "
            "Does model(input_ids) run unpatched?"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not mixers:
        return by_name, False
    # A layer may call the cache before its mixer does.
    return {mixer for mixer in mixers if not any(module in mixers for module in mixer.modules() if module is not mixer)}, True
