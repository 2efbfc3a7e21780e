"""Quantised checkpoints, written by the libraries themselves and loaded with transformers alone."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(frozen=True)
class Checkpoint:
    """A way to quantise a model and to load it again.

    Attributes:
        name: as in the table.
        package: the library that has to be installed.
        write: writes the model that is in a folder, in floating point, quantised into another one.
        load: the options of `from_pretrained` for what was written.
        keeps_state: `state_dict` leaves the model as it is. bitsandbytes 0.50 packs 4-bit weights anew for a CPU at the first forward, and
            `state_dict` unpacks them with other scales.
    """

    name: str
    package: str
    write: Callable[[Path, Path], None]
    load: Callable[[], dict[str, Any]] = field(default=dict)
    keeps_state: bool = True

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def open(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """Load what `write` has written."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **self.load()).eval()


def _quantised_while_loading(config: Callable[[], Any], dense: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config(), dtype=torch.float32)
    model.save_pretrained(folder)


def _torchao(dense: Path, folder: Path, kind: str) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    configs: dict[str, Callable[[], Any]] = {
        "int8": lambda: Int8WeightOnlyConfig(version=2),
        "int8 dynamic": lambda: Int8DynamicActivationInt8WeightConfig(version=2),
        "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), version=2),
    }
    _quantised_while_loading(lambda: TorchAoConfig(configs[kind]()), dense, folder)


def _bitsandbytes(dense: Path, folder: Path, **options: Any) -> None:
    from transformers import BitsAndBytesConfig

    _quantised_while_loading(lambda: BitsAndBytesConfig(**options), dense, folder)


def _compressed_tensors(dense: Path, folder: Path, bits: int, group: int | None = None, dynamic: bool = False) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = {"num_bits": bits, "symmetric": True, "strategy": "channel" if group is None else "group", "group_size": group}
    per_token = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": per_token if dynamic else None}
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)  # of which the scales get their dtype
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if isinstance(module, nn.Linear) and getattr(module, "quantization_scheme", None) is not None:
            rows = module.weight.detach()
            parts = rows[:, None] if group is None else rows.unflatten(1, (-1, group))
            scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def _dequantised() -> dict[str, Any]:
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def _awq(dense: Path, folder: Path) -> None:
    """By compressed-tensors' converter, from a folder as AutoAWQ writes it."""
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    written = folder.with_name(folder.name + "-awq")
    write_awq(dense, written)
    convert_checkpoint(written, folder, AutoAWQConverter.from_pretrained(str(written)), max_workers=1)


def write_awq(dense: Path, folder: Path, group: int = 32) -> None:
    """Write the model in ``dense`` as AutoAWQ does (version "gemm"): nearest levels, with zero points, in groups of inputs.

    ``qweight`` [K, N / 8] int32 holds 8 outputs each, in the order 0 2 4 6 1 3 5 7 from the lowest bits on; so does ``qzeros``
    [K / group, N / 8]; ``scales`` are [K / group, N].
    """
    from safetensors.torch import save_file

    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    state = {name: value.contiguous() for name, value in model.state_dict().items() if not (name == "lm_head.weight" and _is_tied(model))}
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(levels: torch.Tensor) -> torch.Tensor:
        eight = levels.unflatten(1, (-1, 8))[..., order].to(torch.int64)
        words = sum(eight[..., place] << 4 * place for place in range(8))
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            parts = state.pop(f"{name}.weight").T.unflatten(0, (-1, group))  # [G, group, N]
            low, high = parts.amin(1).clamp(max=0), parts.amax(1).clamp(min=0)
            scale = (high - low).clamp(min=1e-8) / 15
            zero = (-low / scale).round().clamp(0, 15)
            levels = (parts / scale[:, None] + zero[:, None]).round().clamp(0, 15).flatten(0, 1)
            state |= {f"{name}.qweight": packed(levels), f"{name}.qzeros": packed(zero), f"{name}.scales": scale.contiguous()}
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    quantisation = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    _write_config(dense, folder, quantisation)


def write_gptq(dense: Path, folder: Path) -> None:
    """Write the config of a GPTQ checkpoint over the model in ``dense``: enough for what transformers asks for first."""
    AutoModelForCausalLM.from_pretrained(dense).save_pretrained(folder)
    _write_config(dense, folder, {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True})


def _write_config(dense: Path, folder: Path, quantisation: dict[str, Any]) -> None:
    config = AutoConfig.from_pretrained(dense).to_dict() | {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _made(
    name: str,
    package: str,
    write: Callable[..., None],
    load: Callable[[], dict[str, Any]] = dict,
    keeps_state: bool = True,
    **options: Any,
) -> Checkpoint:
    return Checkpoint(name, package, lambda dense, folder: write(dense, folder, **options), load, keeps_state)


_CT = "compressed_tensors"
CHECKPOINTS: dict[str, Checkpoint] = {
    each.name: each
    for each in (
        _made("torchao int8", "torchao", _torchao, kind="int8"),
        _made("torchao int8 dynamic", "torchao", _torchao, kind="int8 dynamic"),
        _made("torchao int4", "torchao", _torchao, kind="int4"),
        _made("bitsandbytes 4 bit", "bitsandbytes", _bitsandbytes, keeps_state=False, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        _made("bitsandbytes 8 bit", "bitsandbytes", _bitsandbytes, load_in_8bit=True),
        _made("bitsandbytes 8 bit, no outliers", "bitsandbytes", _bitsandbytes, load_in_8bit=True, llm_int8_threshold=0.0),
        _made("compressed-tensors int8", _CT, _compressed_tensors, bits=8),
        _made("compressed-tensors int8, dequantised", _CT, _compressed_tensors, _dequantised, bits=8),
        _made("compressed-tensors int8 dynamic", _CT, _compressed_tensors, bits=8, dynamic=True),
        _made("compressed-tensors int4", _CT, _compressed_tensors, bits=4, group=32),
        _made("compressed-tensors int4, dequantised", _CT, _compressed_tensors, _dequantised, bits=4, group=32),
        # With zero points per group, and so after AWQ, transformers loads compressed-tensors' weights dequantised only.
        _made("AWQ, converted and dequantised", _CT, _awq, _dequantised),
    )
}
