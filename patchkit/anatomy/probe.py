"""A short forward that records every attention call. `patchkit.anatomy.read_probe` interprets it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.equal_inputs import equal_inputs
from patchkit.anatomy.layers import Subject
from patchkit.attention import alias_of, recorded
from patchkit.errors import PatchError, UnsupportedModel
from patchkit.views import evaluating

PROBE_TOKENS = 4

_PROBE_SHIFT = 101


@dataclass
class Probe:
    """The recording of one forward.

    Attributes:
        cache: after the forward.
        shift: positions of the second row minus those of the first.
        decoder: the module whose forward takes the 2-D attention mask.
        shifted: the decoder takes position_ids, so that the rows had different positions.
        calls: arguments of every attention call, with the index of the cache layer that it belongs to under "layer".
        masks: every mask that was built.
        biases: by layer index, the attention module and the keyword arguments of a call with ALiBi.
    """

    cache: Any
    shift: int
    decoder: Any = None
    shifted: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    biases: dict[int, tuple[nn.Module, dict[str, Any]]] = field(default_factory=dict)


def _decoders(model: Any) -> list[nn.Module]:
    """Modules that may be the decoder, innermost first: some models build the masks one module further out than others."""
    named = model.get_decoder() if hasattr(model, "get_decoder") else None
    candidates = [named, model.base_model, *(child for child in model.children() if hasattr(child, "config"))]
    return list(dict.fromkeys(m for m in candidates if isinstance(m, nn.Module) and not isinstance(m, nn.Linear) and m is not model))


def run_probe(target: Subject) -> Probe:
    """Run the model over two equal rows of `PROBE_TOKENS` tokens at different positions, and record attention.

    Each layer of a quantised model is given equal rows, because its rounding makes the rows differ more and more from layer to layer.

    Raises:
        UnsupportedModel: the model keeps its own kind of cache, fails, or builds its masks outside its decoder.
    """
    model, config = target.model, target.config
    if not _compat.supports_dynamic_cache(model):
        raise UnsupportedModel(f"{type(model).__name__} keeps its state in its own cache class, which cannot be replaced")
    if any(_compat.speaks_old_names(module) for module in (model, *_decoders(model))):
        raise UnsupportedModel(
            f"{type(model).__name__} takes its cache as past_key_values, which is called {_compat.CACHE} since transformers 5.24: "
            "its code was written for an older version. Rename the argument there, or install transformers<5.24"
        )
    limit = target.position_limit or 10**6
    shift = max(1, min(_PROBE_SHIFT, limit - 2 * PROBE_TOKENS))
    ids = probe_tokens(target)
    positions = (torch.arange(PROBE_TOKENS) + torch.tensor([[0], [shift]])).to(ids.device)
    probe = Probe(_compat.DynamicCache(config=config), shift)
    layer_of_call: list[int] = []
    update = probe.cache.update

    def noticed_update(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer_of_call.append(layer_idx)
        return update(keys, values, layer_idx, *args, **kwargs)

    probe.cache.update = noticed_update

    def notice_call(call: dict[str, Any]) -> None:
        probe.calls.append({**call, "layer": layer_of_call[-1] if layer_of_call else -1})

    def notice_bias(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if ("alibi" in kwargs or "position_bias" in kwargs) and isinstance(getattr(module, "layer_idx", None), int):
            probe.biases[module.layer_idx] = (module, kwargs)  # type: ignore[index]

    takes_2d_mask: dict[nn.Module, bool] = {}

    def shift_positions(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = _compat.by_name(decoder, args, kwargs)
        mask = kwargs.get("attention_mask")
        takes_2d_mask[decoder] = torch.is_tensor(mask) and mask.ndim == 2
        if "position_ids" in _compat.argument_names(decoder):
            probe.shifted = True
            kwargs["position_ids"] = positions
        return (), kwargs

    decoders = _decoders(model)
    hooks = [m.register_forward_pre_hook(notice_bias, with_kwargs=True) for m in model.modules() if hasattr(m, "layer_idx")]
    hooks += [m.register_forward_pre_hook(shift_positions, with_kwargs=True) for m in decoders]
    try:
        with (
            evaluating(model),
            torch.no_grad(),
            _compat.attention_set_to(model, alias_of),
            recorded(notice_call, probe.masks.append),
            equal_inputs(model),
        ):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{_compat.CACHE: probe.cache})
    except PatchError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} failed on the two-row probe ({type(error).__name__}: {error}). Does model(input_ids) run unpatched?"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    fitting = [decoder for decoder in decoders if takes_2d_mask.get(decoder)]
    if not fitting:
        raise UnsupportedModel(f"{type(model).__name__} builds its attention masks outside any decoder module that could be hooked")
    probe.decoder = fitting[0]
    return probe


def probe_tokens(target: Subject) -> torch.Tensor:
    """Token ids [2, PROBE_TOKENS] int64 of two equal rows, on the model's device."""
    vocabulary = getattr(target.config, "vocab_size", 100)
    row = torch.arange(PROBE_TOKENS) * 7 % max(vocabulary - 8, 1) + min(7, vocabulary - 1)
    device = target.model.device
    return row.expand(2, -1).contiguous().to(device if device.type != "meta" else "cpu")
