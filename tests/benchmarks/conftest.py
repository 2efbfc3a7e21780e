"""The bars that need a clock or minutes: `make bench`. Nothing here is collected by `make test`.

Each benchmark compares two ways in one run, prints its figure, writes it to `evals/results/` with the machine, the versions and
the command, and asserts its bar.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from patchkit.measure.environment import environment

RESULTS = Path(__file__).resolve().parents[2] / "evals" / "results"

# hidden size, layers, heads of the Pythia suite (Biderman et al. 2023, https://arxiv.org/abs/2304.01373, table 1)
PYTHIA = {"70m": (512, 6, 8), "160m": (768, 12, 12), "410m": (1024, 24, 16)}


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record(name, figure, bar, **details)`: print a figure and keep it in `evals/results/<name>.json`."""

    def keep(name: str, figure: float, bar: str, **details: Any) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        command = f"python -m pytest {request.node.nodeid} --benchmark-only"
        result = {"figure": figure, "bar": bar, **details, "command": command, "environment": environment()}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        extra = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in details.items())
        print(f"\n{name}: {figure:.4g} (bar {bar}); {extra}")

    return keep


@pytest.fixture(scope="session")
def pythia() -> Callable[[str], PreTrainedModel]:
    """`pythia("160m")`: a model of that shape with random fp32 weights; each is built once."""
    built: dict[str, PreTrainedModel] = {}

    def build(size: str) -> PreTrainedModel:
        if size not in built:
            hidden, layers, heads = PYTHIA[size]
            config = GPTNeoXConfig(
                vocab_size=50304,
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * hidden,
                max_position_embeddings=2048,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            )
            torch.manual_seed(0)
            built[size] = GPTNeoXForCausalLM(config).eval()
        return built[size]

    return build
