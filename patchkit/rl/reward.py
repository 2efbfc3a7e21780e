"""Rewards that can be trusted: a verifier signs its verdicts, and the trainer takes no reward that is not the one that was signed.

    key = HmacKey.from_file("key")
    reward = checked(signed(ExactAnswer(marker="####"), key), key, ledger="rewards.jsonl")
    GRPOTrainer(model, reward_funcs=reward, ...)

The verifier may run elsewhere: `signed` there, and here `checked` over a function that asks it.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from patchkit.errors import RewardError
from patchkit.rl.keys import Checker as Checker
from patchkit.rl.keys import Ed25519Key as Ed25519Key
from patchkit.rl.keys import Ed25519PublicKey as Ed25519PublicKey
from patchkit.rl.keys import HmacKey as HmacKey
from patchkit.rl.keys import Signer as Signer
from patchkit.rl.ledger import Ledger as Ledger
from patchkit.rl.ledger import LedgerSummary as LedgerSummary
from patchkit.rl.ledger import verify_ledger as verify_ledger
from patchkit.rl.verdict import RewardVerdict as RewardVerdict
from patchkit.rl.verdict import SignedVerdict as SignedVerdict
from patchkit.rl.verdict import digest
from patchkit.rl.verifiers import ExactAnswer as ExactAnswer
from patchkit.rl.verifiers import MatchesPattern as MatchesPattern
from patchkit.rl.verifiers import MatchesSchema as MatchesSchema
from patchkit.rl.verifiers import Verifier

# (prompts, completions, step, columns) -> a signed verdict for each completion
Source = Callable[..., Sequence[SignedVerdict]]

# Arguments of TRL's reward functions that are no columns of the data set.
_NO_COLUMNS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def signed(verifier: Verifier, key: Signer, name: str | None = None) -> Source:
    """Return a function that has a verifier judge completions, and signs what it says.

    The function takes ``prompts``, ``completions``, ``step`` and the columns of the data set, lists of one value for each completion, and
    returns a `SignedVerdict` for each.

    Args:
        name: of the verifier, in its verdicts; None for its own.
    """
    name = name or getattr(verifier, "name", None) or getattr(verifier, "__name__", None) or type(verifier).__name__
    return functools.partial(_judge, verifier, key, name)


def _judge(
    verifier: Verifier, key: Signer, name: str, prompts: Sequence[Any], completions: Sequence[Any], step: int, **columns: Sequence[Any]
) -> list[SignedVerdict]:
    found = []
    for prompt, completion, row in zip(prompts, completions, _rows(columns, len(completions)), strict=True):
        reward = verifier(prompt, completion, **row)
        if reward is None:
            raise RewardError(f"the verifier {name} gave None for a completion: give a number for each")
        found.append(RewardVerdict.of(name, prompt, completion, reward, step).signed(key))
    return found


def _rows(columns: dict[str, Sequence[Any]], count: int) -> Iterator[dict[str, Any]]:
    for name, values in columns.items():
        if len(values) != count:
            raise RewardError(f"the column {name!r} has {len(values)} values for {count} completions")
    for index in range(count):
        yield {name: values[index] for name, values in columns.items()}


def checked(
    source: Source, key: Checker, ledger: str | os.PathLike[str] | None = None, least: float = 0.0, most: float = 1.0
) -> CheckedReward:
    """Return a reward function for TRL that takes verdicts from ``source``, and raises on the first that is not what it should be.

    A reward of 0 in its place would be trained on. Checked are: one verdict for each completion, the signature, the hashes of prompt and
    completion, the step, a nonce that was not seen, and a finite reward within its bounds.

    Args:
        source: what `signed` returns, or a function with the same arguments that asks a verifier elsewhere.
        key: that checks; of Ed25519 the public half is enough.
        ledger: a file to which all verdicts are appended; None for none. Verdicts in it were seen.
        least, most: bounds of a reward.

    Raises:
        RewardError: the ledger cannot be written, or is none.
    """
    return CheckedReward(source, key, None if ledger is None else Ledger(ledger), least, most)


class CheckedReward:
    """A reward function for TRL; made by `checked`.

    Attributes:
        ledger: where its verdicts are kept; None for nowhere.
    """

    __name__ = "checked_reward"  # by which TRL logs it

    def __init__(self, source: Source, key: Checker, ledger: Ledger | None, least: float, most: float) -> None:
        self.source, self.key, self.ledger, self.least, self.most = source, key, ledger, least, most
        self._nonces: dict[int, set[str]] = defaultdict(set)
        if ledger is not None:
            self._nonces.update({step: set(nonces) for step, nonces in ledger.nonces.items()})
        self._step: int | None = None

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], trainer_state: Any = None, step: int | None = None, **columns: Any
    ) -> list[float]:
        """Return the reward of every completion.

        Args:
            prompts, completions: strings, or lists of messages.
            trainer_state: of transformers' trainer, which has the step.
            step: of the training, where there is no such state.
            columns: of the data set, a value for each completion.

        Raises:
            RewardError: a verdict is not what it should be, or there is no step.
        """
        step = trainer_state.global_step if step is None and trainer_state is not None else step
        if step is None:
            raise RewardError("verdicts are of a step of the training: give step=, or call through a trainer")
        self._begin(step)
        columns = {name: values for name, values in columns.items() if name not in _NO_COLUMNS}
        verdicts = list(self.source(prompts=prompts, completions=completions, step=step, **columns))
        if len(verdicts) != len(completions):
            raise RewardError(f"{len(verdicts)} verdicts for {len(completions)} completions")
        for number, (prompt, completion, each) in enumerate(zip(prompts, completions, verdicts, strict=True)):
            try:
                self._check(each, prompt, completion, step)
            except RewardError as error:
                raise RewardError(f"verdict {number} of {len(verdicts)} in step {step}: {error}") from None
        if self.ledger is not None:
            self.ledger.append(verdicts)
        return [each.verdict.reward for each in verdicts]

    def _begin(self, step: int) -> None:
        """Forget nonces of earlier steps, whose verdicts are refused by their step."""
        if self._step is not None and step < self._step:
            raise RewardError(f"step {step} comes after step {self._step}: make a new reward function to train from an earlier step again")
        for old in [each for each in self._nonces if each < step]:
            del self._nonces[old]
        self._step = step

    def _check(self, signed: SignedVerdict, prompt: Any, completion: Any, step: int) -> None:
        signed.check(self.key)
        verdict = signed.verdict
        for name, text, found in (("prompt", prompt, verdict.prompt_sha256), ("completion", completion, verdict.completion_sha256)):
            if digest(text) != found:
                raise RewardError(f"it is a verdict on another {name}")
        if verdict.step != step:
            raise RewardError(f"it is a verdict of step {verdict.step}")
        if not self.least <= verdict.reward <= self.most:
            raise RewardError(f"the reward {verdict.reward:g} is not between {self.least:g} and {self.most:g}")
        if verdict.nonce in self._nonces[step]:
            raise RewardError(f"it was used before (nonce {verdict.nonce})")
        self._nonces[step].add(verdict.nonce)
