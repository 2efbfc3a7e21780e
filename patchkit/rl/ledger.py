"""A ledger: the signed verdicts of a training run, one line of JSON each, in which every line holds the hash of the one before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.errors import RewardError
from patchkit.rl.keys import Checker
from patchkit.rl.verdict import SignedVerdict, canonical

# What stands for the line before the first.
_START = "0" * 64


@dataclass(frozen=True)
class LedgerSummary:
    """The content of a ledger, all of it verified.

    Attributes:
        verdicts: how many.
        first_step, last_step: lowest and highest step of the training; None without verdicts.
        mean_reward: None without verdicts.
        verifiers: number of verdicts by the name of the verifier.
        last_line: hash of the last line. Kept elsewhere, it shows whether lines were cut off at the end later.
    """

    verdicts: int
    first_step: int | None
    last_step: int | None
    mean_reward: float | None
    verifiers: dict[str, int]
    last_line: str


class Ledger:
    """A file that verdicts are appended to. One process at a time writes it.

    Args:
        path: a new file, or one that is continued.

    Attributes:
        nonces: of all verdicts in it, by step.

    Raises:
        RewardError: the file cannot be written, another process writes it, or it is no ledger.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.nonces: dict[int, set[str]] = defaultdict(set)
        self._last = _START
        try:
            # Kept open, and locked.
            self._file = open(self.path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise RewardError(f"the ledger {path} cannot be written ({error.strerror}): give another path") from None
        try:
            _lock(self._file, self.path)
            self._file.seek(0)
            for signed, line in _lines(self._file, self.path):
                self.nonces[signed.verdict.step].add(signed.verdict.nonce)
                self._last = line
        except BaseException:
            self._file.close()
            raise

    def append(self, verdicts: Iterable[SignedVerdict]) -> None:
        """Write verdicts, and hand them to the operating system.

        Raises:
            RewardError: the file cannot be written.
        """
        text = b""
        last = self._last
        for each in verdicts:
            line = canonical({**each.to_dict(), "previous": last})
            last = hashlib.sha256(line).hexdigest()
            text += line + b"\n"
            self.nonces[each.verdict.step].add(each.verdict.nonce)
        try:
            self._file.write(text)
            self._file.flush()
        except (OSError, ValueError) as error:
            raise RewardError(f"the ledger {self.path} cannot be written ({error})") from None
        self._last = last

    def close(self) -> None:
        """Close the file, which another process may then write."""
        self._file.close()


def verify_ledger(path: str | os.PathLike[str], key: Checker) -> LedgerSummary:
    """Check every line of a ledger: form, place, signature, and a nonce that no other line has.

    Raises:
        RewardError: the file cannot be read, or a line is not what it should be; the message has its number.
    """
    count, total, steps, verifiers, nonces, last = 0, 0.0, [0, 0], defaultdict[str, int](int), set[str](), _START
    try:
        with open(path, "rb") as file:
            for signed, line in _lines(file, Path(path)):
                count += 1
                verdict = signed.verdict
                try:
                    signed.check(key)
                except RewardError as error:
                    raise RewardError(f"line {count} of {path}: {error}") from None
                if verdict.nonce in nonces:
                    raise RewardError(f"line {count} of {path}: a verdict that was there before (nonce {verdict.nonce})")
                nonces.add(verdict.nonce)
                steps = [verdict.step] * 2 if count == 1 else [min(steps[0], verdict.step), max(steps[1], verdict.step)]
                total += verdict.reward
                verifiers[verdict.verifier] += 1
                last = line
    except OSError as error:
        raise RewardError(f"the ledger {path} cannot be read ({error.strerror})") from None
    if not count:
        return LedgerSummary(0, None, None, None, {}, last)
    return LedgerSummary(count, steps[0], steps[1], total / count, dict(verifiers), last)


def _lines(file: Any, path: Path) -> Iterator[tuple[SignedVerdict, str]]:
    """The verdicts of a ledger, each with the hash of its line; their signatures are not checked."""
    last = _START
    for number, raw in enumerate(file, 1):
        where = f"line {number} of {path}"
        if not raw.endswith(b"\n"):
            raise RewardError(f"{where} is cut off: an earlier run was interrupted while it wrote. Remove that line to go on")
        line = raw[:-1]
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            raise RewardError(f"{where} is no JSON: this is no ledger, or it was changed") from None
        previous = data.pop("previous", None) if isinstance(data, dict) else None
        try:
            signed = SignedVerdict.from_dict(data)
            is_canonical = canonical({**data, "previous": previous}) == line
        except RewardError as error:
            raise RewardError(f"{where}: {error}") from None
        if not is_canonical:
            raise RewardError(f"{where} is not in canonical form: it was changed")
        if previous != last:
            raise RewardError(f"{where} does not follow the line before it: a line was changed, removed, added or moved")
        last = hashlib.sha256(line).hexdigest()
        yield signed, last


def _lock(file: Any, path: Path) -> None:
    """Keep other processes from writing a file as long as it is open, where the system can do that."""
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RewardError(f"another process writes the ledger {path}: give each process one of its own") from None
