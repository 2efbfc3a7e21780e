"""Train a patched policy with GRPO on rewards that are signed: python examples/grpo.py [MODEL [STEPS]]

The policy learns to begin a function with a docstring. Needs `pip install 'patchkit[rl]'`. How it works is in docs/rl.md.
"""

import secrets
import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from patchkit import patch_model, report
from patchkit.models import load_model
from patchkit.rl.reward import HmacKey, MatchesPattern, checked, signed, verify_ledger

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "bundled")
patch_model(model, "speculative(draft=suffix)")  # the policy's own texts; past rollouts draft for later ones

names = ("read", "write", "close", "parse")
prompts = Dataset.from_dict({"prompt": [f"    def {name}(self):\n" for name in names]})
key = HmacKey(secrets.token_bytes(32))
reward = checked(signed(MatchesPattern(r'\s*"""(.|\n)*'), key), key, ledger="rewards.jsonl")

options = GRPOConfig(
    output_dir="grpo",
    max_steps=int(sys.argv[2]) if len(sys.argv) > 2 else 20,
    per_device_train_batch_size=8,
    num_generations=8,
    max_completion_length=16,
    learning_rate=1e-4,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    bf16=False,
)
trainer = GRPOTrainer(model=model, reward_funcs=reward, args=options, train_dataset=prompts, processing_class=tokenizer)
trainer.train()

print("rewards:", *(round(each["reward"], 2) for each in trainer.state.log_history if "reward" in each))
print(f"{verify_ledger('rewards.jsonl', key).verdicts} verdicts, all signed")
print(report(model))
