"""TRL's trainers on a patched policy: step by step what they do on the unpatched one, wherever the patch is lossless."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import BEGINNINGS, matrix

from patchkit import patch_model, report
from patchkit.errors import PatchConflict, RewardError
from patchkit.models import load_model
from patchkit.rl import Rollouts, logprobs, rollout_func
from patchkit.rl.reward import ExactAnswer, HmacKey, checked, signed, verify_ledger
from patchkit.speculation.shared import speculation_of
from patchkit.speculation.statistics import RunStatistics

pytest.importorskip("trl", reason="TRL is not installed: pip install 'patchkit[rl]'")

SUFFIX = "speculative(draft=[suffix, prompt_lookup], k=4)"
VIEW = "mlp_int8(mode=weight_only, view=True)"
# The window is lossless: it drafts.
LOSSLESS = [SUFFIX, "lossless: streaming(window=28)", f"gemv + {SUFFIX}", "compile(backend=eager)", "prefix_cache(block=4)"]
LOSSY = [f"{VIEW} + speculative(k=4)", "streaming(window=12)"]
GROUP, NEW = 4, 12


@dataclasses.dataclass
class Run:
    """What a training did: losses, rewards and gradient norms of every step, all completions, and the weights in the end."""

    log: list[dict[str, float]]
    completions: list[list[int]]
    weights: dict[str, torch.Tensor]
    trainer: Any


class Rewarded:
    """A reward that differs within a group of equal completions, so that greedy rollouts train too."""

    __name__ = "rewarded"

    def __init__(self) -> None:
        self.completions: list[list[int]] = []

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[list[int]], **columns: Any
    ) -> list[float]:
        self.completions += [list(ids) for ids in completion_ids]
        return [len(set(text)) / 10 + index % GROUP for index, text in enumerate(completions)]


def train(
    name: str, spec: str | None, steps: int, folder: Path, lora: bool = False, checkpointing: bool = False, kind: str = "GRPO",
    group: int = GROUP, reward: Any = None, prompts: Sequence[str] = BEGINNINGS, rollouts: Any = None, **options: Any,
) -> Run:  # fmt: skip
    import peft
    import trl
    from datasets import Dataset

    model, tokenizer = load_model(name)
    if spec is not None:
        patch_model(model, spec.removeprefix("lossless: "), lossless=spec.startswith("lossless: "), verbose=False)
    reward = reward or Rewarded()
    settings = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": group, "num_generations": group,
        "max_completion_length": NEW, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True,
        "logging_steps": 1, "save_strategy": "no", "generation_kwargs": {"do_sample": False}, "beta": 0.0,
        # The advantages of equal completions add up to 0. Such a bound of the ratio clips the negative ones away: greedy rollouts train.
        "epsilon": -0.1, "epsilon_high": 0.2,
        "bf16": False, "gradient_checkpointing": checkpointing, "disable_tqdm": True, "seed": 0, **options,
    }  # fmt: skip
    extra = {} if rollouts is None else {"rollout_func": rollouts}
    adapter = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    torch.manual_seed(0)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, reward_funcs=reward, args=getattr(trl, f"{kind}Config")(**settings), processing_class=tokenizer, peft_config=adapter,
        train_dataset=Dataset.from_dict({"prompt": list(prompts), "answer": ["pass"] * len(prompts)}), **extra,
    )  # fmt: skip
    trainer.train()
    log = [{key: each[key] for key in ("loss", "reward", "grad_norm")} for each in trainer.state.log_history if "reward" in each]
    weights = {key: weight.detach().clone() for key, weight in trainer.model.named_parameters()}
    return Run(log, getattr(reward, "completions", []), weights, trainer)


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`unpatched(name, steps, ...)`: the same training without a patch, once for each set of arguments."""

    @functools.cache
    def run(name: str, steps: int, **options: Any) -> Run:
        return train(name, None, steps, tmp_path_factory.mktemp("run"), **options)

    return run


def assert_same(found: Run, wanted: Run, steps: int) -> None:
    assert len(wanted.log) == steps and len({each["reward"] for each in wanted.log}) > 1
    assert all(each["grad_norm"] > 0.01 and each["loss"] for each in wanted.log)
    assert found.completions == wanted.completions
    assert found.log == wanted.log
    assert found.weights.keys() == wanted.weights.keys()
    assert all(torch.equal(found.weights[key], wanted.weights[key]) for key in wanted.weights)


CASES = [
    ("stdlib-1m-draft", 3, SUFFIX),
    *(matrix(name, 20, spec) for name in ("stdlib-1m-draft", "stdlib-7m") for spec in LOSSLESS),
]


@pytest.mark.parametrize(("name", "steps", "spec"), CASES)
def test_lossless_patches_train_as_the_unpatched_policy(name: str, steps: int, spec: str, unpatched: Any, tmp_path: Path) -> None:
    found = train(name, spec, steps, tmp_path)
    assert_same(found, unpatched(name, steps), steps)
    assert any(report(found.trainer.model).patches[-1].hits.values())
    if "speculative" in spec:
        assert report(found.trainer.model).patches[-1].hits["proposed"] > 0
        assert report(found.trainer.model).patches[-1].hits.get("stock calls", 0) == 0


@pytest.mark.parametrize(
    ("kind", "lora", "checkpointing"),
    [
        matrix("GRPO", True, True),
        matrix("RLOO", False, False),
        matrix("RLOO", True, True),
        matrix("GRPO", True, False),
        matrix("GRPO", False, True),
    ],
)
def test_trainers_adapters_and_checkpointing(kind: str, lora: bool, checkpointing: bool, unpatched: Any, tmp_path: Path) -> None:
    options = {"kind": kind, "lora": lora, "checkpointing": checkpointing}
    for spec in (SUFFIX, "lossless: streaming(window=28)"):
        found = train("stdlib-1m-draft", spec, 3, tmp_path, **options)
        assert_same(found, unpatched("stdlib-1m-draft", 3, **options), 3)
        assert report(found.trainer.model).patches[0].hits["proposed"] > 0


@pytest.mark.parametrize(
    ("name", "steps", "spec"),
    [*(matrix(n, 20, s) for n in ("stdlib-1m-draft", "stdlib-7m") for s in LOSSY)],
)
def test_lossy_patches_run_and_say_that_rollouts_are_off_policy(name: str, steps: int, spec: str, tmp_path: Path) -> None:
    found = train(name, spec, steps, tmp_path)
    assert len(found.log) == steps and all(each["grad_norm"] > 0 for each in found.log)
    facts = report(found.trainer.model).patches[0]
    assert any("off-policy" in warning and "lossless=True" in warning for warning in facts.warnings)
    if "view" in spec:
        assert facts.hits["requantised"] == steps - 1 and facts.hits["forwards over the trained weights"] >= steps
        policy, ids = found.trainer.model, torch.arange(12)[None] + 40
        before = logprobs(policy, ids)
        policy.base_model.layers[0].mlp.up_proj.weight.data.mul_(1.01)
        assert not torch.equal(logprobs(policy, ids), before)


def test_a_rollout_func_gives_what_generate_gives(unpatched: Any, tmp_path: Path) -> None:
    found = train("stdlib-1m-draft", SUFFIX, 3, tmp_path, rollouts=Rollouts(slots=3))
    wanted = unpatched("stdlib-1m-draft", 3)
    assert found.completions == wanted.completions and found.log == wanted.log
    trainer = found.trainer
    output = rollout_func(list(BEGINNINGS[:3]), trainer)
    for prompt, completion, scores in zip(output["prompt_ids"], output["completion_ids"], output["logprobs"], strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logits = trainer.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores), own, atol=2e-4, rtol=1e-4)


@pytest.mark.matrix
def test_a_rollout_func_under_lora(unpatched: Any, tmp_path: Path) -> None:
    found = train("stdlib-1m-draft", SUFFIX, 3, tmp_path, rollouts=rollout_func, lora=True)
    assert_same(found, unpatched("stdlib-1m-draft", 3, lora=True), 3)


@pytest.mark.matrix
def test_a_rollout_func_without_speculative_says_so(tmp_path: Path) -> None:
    with pytest.raises(PatchConflict, match="not patched with speculative"):
        train("stdlib-1m-draft", None, 1, tmp_path, rollouts=rollout_func)


@pytest.mark.matrix
def test_signed_rewards_in_a_trainer(tmp_path: Path) -> None:
    key = HmacKey(bytes(range(32)))
    reward = checked(signed(ExactAnswer(), key), key, ledger=tmp_path / "ledger")
    train("stdlib-1m-draft", SUFFIX, 3, tmp_path / "run", reward=reward)
    assert verify_ledger(tmp_path / "ledger", key).verdicts == 3 * GROUP
    with pytest.raises(RewardError, match="signature"):
        train("stdlib-1m-draft", SUFFIX, 1, tmp_path / "run", reward=checked(signed(ExactAnswer(), key), HmacKey(bytes(32))))


@pytest.mark.parametrize("sampled", [matrix(False), matrix(True)])
def test_past_rollouts_draft_for_the_second_epoch(sampled: bool, tmp_path: Path) -> None:
    """With 8 completions of each prompt. Tokens per round are counted, so that no clock decides."""
    prompts = BEGINNINGS[:4]
    options = {"generation_kwargs": {}} if sampled else {}
    found = train(
        "stdlib-7m", "speculative(draft=suffix, k=4)", 2 * len(prompts), tmp_path, group=8, prompts=prompts,
        learning_rate=1e-6, max_completion_length=48, **options,
    )  # fmt: skip
    runs = list(speculation_of(found.trainer.model).runs)
    assert len(runs) == 2 * len(prompts)
    first, second = (RunStatistics.merged(each).tokens_per_target_step for each in (runs[: len(prompts)], runs[len(prompts) :]))
    print(f"sampled {sampled}: {first:.2f} tokens per round and row, then {second:.2f}")
    assert second >= 1.5
