"""Signed rewards: what a tampered verdict does, keys, ledgers, and verifiers."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from patchkit.errors import RewardError
from patchkit.rl import verifiers
from patchkit.rl.reward import (
    Ed25519Key,
    Ed25519PublicKey,
    ExactAnswer,
    HmacKey,
    Ledger,
    MatchesPattern,
    MatchesSchema,
    SignedVerdict,
    checked,
    digest,
    signed,
    verify_ledger,
)
from patchkit.rl.verdict import RewardVerdict, canonical

SECRET = bytes(range(32))
KEY, OTHER_KEY = HmacKey(SECRET), HmacKey(bytes(32))
PROMPTS, COMPLETIONS = ["1 + 1 =", "2 + 3 ="], [" 2", " 6"]
ANSWERS = {"answer": ["2", "5"]}


def verdicts(step: int = 4, key: Any = KEY) -> list[SignedVerdict]:
    return list(signed(ExactAnswer(), key)(PROMPTS, COMPLETIONS, step, **ANSWERS))


def asked(found: list[SignedVerdict], step: int = 4, **options: Any) -> list[float]:
    return checked(lambda **given: found, options.pop("key", KEY), **options)(PROMPTS, COMPLETIONS, step=step, **ANSWERS)


def changed(signed_verdict: SignedVerdict, **fields: Any) -> SignedVerdict:
    return dataclasses.replace(signed_verdict, verdict=dataclasses.replace(signed_verdict.verdict, **fields))


def anew(reward: float, prompt: str, completion: str, step: int = 4) -> SignedVerdict:
    return RewardVerdict("exact_answer", digest(prompt), digest(completion), reward, step, "0" * 32, "now").signed(KEY)


def test_good_verdicts_are_the_rewards() -> None:
    assert asked(verdicts()) == [1.0, 0.0]
    reward = checked(signed(ExactAnswer(), KEY), KEY)
    state = SimpleNamespace(global_step=7)
    extra = {"completion_ids": [[1], [2]], "log_extra": print, "log_metric": print}  # what TRL hands over besides columns
    for _ in range(2):
        assert reward(PROMPTS, COMPLETIONS, trainer_state=state, **ANSWERS, **extra) == [1.0, 0.0]


TAMPERED = {
    "reward": (lambda: [changed(verdicts()[0], reward=0.5), verdicts()[1]], "signature"),
    "completion": (lambda: [verdicts()[0], anew(1.0, PROMPTS[1], " 5")], "another completion"),
    "prompt": (lambda: [verdicts()[0], anew(1.0, "3 + 3 =", COMPLETIONS[1])], "another prompt"),
    "key": (lambda: verdicts(key=OTHER_KEY), "signature"),
    "nonce": (lambda: [(first := verdicts()[0]), changed(verdicts()[1], nonce=first.verdict.nonce)], "signature"),
    "step": (lambda: verdicts(step=3), "step 3"),
    "NaN": (lambda: [changed(verdicts()[0], reward=float("nan")), verdicts()[1]], "no finite number"),
    "truncated signature": (lambda: [dataclasses.replace(each, signature=each.signature[:-2]) for each in verdicts()], "signature"),
    "swapped pair": (lambda: verdicts()[::-1], "another prompt"),
    # Beyond the nine: what is signed, and wrong all the same.
    "range": (lambda: [anew(7.0, PROMPTS[0], COMPLETIONS[0]), verdicts()[1]], "not between 0 and 1"),
    "one too few": (lambda: verdicts()[:1], "1 verdicts for 2 completions"),
    "no signature": (lambda: [dataclasses.replace(each, signature="") for each in verdicts()], "signature"),
    "another verifier": (lambda: [changed(verdicts()[0], verifier="kind"), verdicts()[1]], "signature"),
    "another time": (lambda: [changed(verdicts()[0], issued="later"), verdicts()[1]], "signature"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_verdict_raises(what: str) -> None:
    make, message = TAMPERED[what]
    with pytest.raises(RewardError, match=message):
        asked(make())


def test_a_verdict_counts_once(tmp_path: Path) -> None:
    found = verdicts()
    reward = checked(lambda **given: found, KEY, ledger=tmp_path / "ledger")
    assert reward(PROMPTS, COMPLETIONS, step=4) == [1.0, 0.0]
    with pytest.raises(RewardError, match="was used before"):
        reward(PROMPTS, COMPLETIONS, step=4)
    reward.ledger.close()
    with pytest.raises(RewardError, match="was used before"):  # nor in another process that goes on with the ledger
        asked(found, ledger=tmp_path / "ledger")
    twice = [found[0], found[0]]
    with pytest.raises(RewardError, match="verdict 1 of 2"):
        checked(lambda **given: twice, KEY)(PROMPTS[:1] * 2, COMPLETIONS[:1] * 2, step=4)


def test_a_step_is_needed_and_does_not_go_back() -> None:
    reward = checked(signed(ExactAnswer(), KEY), KEY)
    with pytest.raises(RewardError, match="give step="):
        reward(PROMPTS, COMPLETIONS, **ANSWERS)
    reward(PROMPTS, COMPLETIONS, step=5, **ANSWERS)
    with pytest.raises(RewardError, match="step 4 comes after step 5"):
        reward(PROMPTS, COMPLETIONS, step=4, **ANSWERS)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "1", True])
def test_a_verifier_has_to_give_a_number(value: Any) -> None:
    with pytest.raises(RewardError, match="gave"):
        checked(signed(lambda prompt, completion, **row: value, KEY), KEY)(PROMPTS, COMPLETIONS, step=0, **ANSWERS)


def test_a_signature_is_that_of_the_canonical_form() -> None:
    """By hand, with nothing of patchkit but the key's bytes."""
    import hashlib
    import hmac

    each = anew(0.1, "é", "\ud800 of a cut pair")
    completion, prompt = (hashlib.sha256(raw).hexdigest() for raw in (b'"\\ud800 of a cut pair"', b'"\\u00e9"'))
    text = f'{{"completion_sha256":"{completion}","issued":"now","nonce":"{"0" * 32}","prompt_sha256":"{prompt}","reward":0.1,'
    text += '"step":4,"verifier":"exact_answer","version":1}'
    wanted = hmac.new(SECRET, b"patchkit verdict\n" + text.encode(), hashlib.sha256).hexdigest()
    assert each.signature == f"hmac-sha256:{wanted}"
    each.check(KEY)
    chat = [{"role": "user", "content": "é"}]
    assert digest(chat) != digest("é") and digest(chat) == hashlib.sha256(b'[{"content":"\\u00e9","role":"user"}]').hexdigest()


def test_a_verdict_survives_json_and_nothing_else_does() -> None:
    each = verdicts()[0]
    data = json.loads(json.dumps(each.to_dict()))
    assert SignedVerdict.from_dict(data) == each
    for wrong in (None, [], {}, {**data, "more": 1}, {**data, "signature": 3}, {"verdict": {}, "signature": ""}):
        with pytest.raises(RewardError, match="no signed verdict"):
            SignedVerdict.from_dict(wrong)
    for name, value in (("step", 1.0), ("step", True), ("reward", "1"), ("nonce", 3), ("version", 2)):
        with pytest.raises(RewardError, match=name):
            SignedVerdict.from_dict({**data, "verdict": {**data["verdict"], name: value}})


# -- keys ------------------------------------------------------------------------------------------------------------------


def test_keys_are_read_from_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"0123456789abcdef0123456789abcdef\n")
    path.chmod(0o600)
    message = b"anything"
    monkeypatch.setenv("PATCHKIT_TEST_KEY", "0123456789abcdef0123456789abcdef")
    assert HmacKey.from_file(path).sign(message) == HmacKey.from_environment("PATCHKIT_TEST_KEY").sign(message)
    path.chmod(0o644)
    with pytest.raises(RewardError, match="chmod 600"):
        HmacKey.from_file(path)
    path.chmod(0o600)
    path.write_bytes(bytes(range(1, 32)))
    with pytest.raises(RewardError, match="31 bytes"):
        HmacKey.from_file(path)
    with pytest.raises(RewardError, match="cannot be read"):
        HmacKey.from_file(tmp_path / "missing")
    with pytest.raises(RewardError, match="not set"):
        HmacKey.from_environment("PATCHKIT_NO_SUCH_KEY")
    assert SECRET.hex() not in repr(KEY) and str(SECRET) not in repr(vars(checked(signed(ExactAnswer(), KEY), KEY)))


def test_ed25519_checks_with_the_public_half(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is not installed: pip install 'patchkit[signing]'")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    def write(key: Any, name: str) -> tuple[Path, Path]:
        private, public = tmp_path / name, tmp_path / f"{name}.pub"
        private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
        private.chmod(0o600)
        public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
        return private, public

    private, public = write(Ed25519PrivateKey.generate(), "key")
    key, only_public = Ed25519Key.from_file(private), Ed25519PublicKey.from_file(public)
    assert asked(verdicts(key=key), key=only_public) == [1.0, 0.0]
    assert not hasattr(only_public, "sign")
    for wrong in (verdicts(key=KEY), [dataclasses.replace(each, signature=each.signature[:-2]) for each in verdicts(key=key)]):
        with pytest.raises(RewardError, match="signature"):
            asked(wrong, key=only_public)
    _, other = write(Ed25519PrivateKey.generate(), "other")
    with pytest.raises(RewardError, match="signature"):
        asked(verdicts(key=key), key=Ed25519PublicKey.from_file(other))
    curve, curve_public = write(generate_private_key(SECP256R1()), "curve")
    with pytest.raises(RewardError, match="give an Ed25519 key"):
        Ed25519Key.from_file(curve)
    with pytest.raises(RewardError, match="give an Ed25519 key"):
        Ed25519PublicKey.from_file(curve_public)
    with pytest.raises(RewardError, match="no public key"):
        Ed25519PublicKey.from_file(private)
    private.chmod(0o640)
    with pytest.raises(RewardError, match="chmod 600"):
        Ed25519Key.from_file(private)


def test_ed25519_without_its_library_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    path = tmp_path / "key"
    path.write_text("")
    path.chmod(0o600)
    with pytest.raises(RewardError, match=r"patchkit\[signing\]"):
        Ed25519Key.from_file(path)


# -- ledgers ---------------------------------------------------------------------------------------------------------------


def written(path: Path, steps: int = 3) -> list[bytes]:
    ledger = Ledger(path)
    for step in range(steps):
        ledger.append(verdicts(step))
    ledger.close()
    return path.read_bytes().splitlines(keepends=True)


def test_a_ledger_is_continued_and_verified(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert len(written(path)) == 6
    ledger = Ledger(path)
    with pytest.raises(RewardError, match="another process"):
        Ledger(path)
    ledger.append(verdicts(9))
    ledger.close()
    found = verify_ledger(path, KEY)
    assert (found.verdicts, found.first_step, found.last_step, found.mean_reward) == (8, 0, 9, 0.5)
    assert found.verifiers == {"exact_answer": 8}


def _forged(line: bytes) -> bytes:
    data = json.loads(line)
    data["verdict"]["reward"] = 1.0
    return canonical(data) + b"\n"


DAMAGE = {
    "a reward": (lambda lines: [*lines[:3], _forged(lines[3]), *lines[4:]], "line 4 .*(signature|follow)"),
    "the last reward": (lambda lines: [*lines[:5], _forged(lines[5])], "line 6 .*signature"),
    "a line less": (lambda lines: lines[:2] + lines[3:], "line 3 .*does not follow"),
    "the first line": (lambda lines: lines[1:], "line 1 .*does not follow"),
    "two in another order": (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1 .*does not follow"),
    "a line twice": (lambda lines: [*lines, lines[-1]], "line 7 .*does not follow"),
    "half a line": (lambda lines: [*lines[:5], lines[5][:40]], "line 6 .*cut off"),
    "spaces": (lambda lines: [lines[0].replace(b":", b": ", 1), *lines[1:]], "line 1 .*canonical"),
    "no JSON": (lambda lines: [*lines, b"hello\n"], "line 7 .*no JSON"),
    "NaN": (lambda lines: [lines[0].replace(b'"reward":1.0', b'"reward":NaN'), *lines[1:]], "line 1 "),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_ledger_is_refused_by_its_line(what: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    damage, message = DAMAGE[what]
    path.write_bytes(b"".join(damage(written(path))))
    with pytest.raises(RewardError, match=message):
        verify_ledger(path, KEY)
    if "signature" not in message:
        with pytest.raises(RewardError, match=message):
            Ledger(path)


def test_a_ledger_under_another_key_or_that_cannot_be_used(tmp_path: Path) -> None:
    written(tmp_path / "ledger")
    with pytest.raises(RewardError, match=r"line 1 of .*signature"):
        verify_ledger(tmp_path / "ledger", OTHER_KEY)
    with pytest.raises(RewardError, match="cannot be written"):
        Ledger(tmp_path)  # a folder
    with pytest.raises(RewardError, match="cannot be read"):
        verify_ledger(tmp_path / "missing", KEY)


def test_a_replayed_verdict_in_a_ledger_is_found(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    found = verdicts()
    ledger.append([*found, found[0]])
    ledger.close()
    with pytest.raises(RewardError, match=r"line 3 .*was there before"):
        verify_ledger(tmp_path / "ledger", KEY)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from patchkit.cli import app

    path, key = tmp_path / "ledger", tmp_path / "key"
    written(path)
    key.write_bytes(SECRET[1:] + b"!")
    key.chmod(0o600)
    monkeypatch.setenv("PATCHKIT_TEST_KEY", "x" * 32)
    runner = CliRunner()
    wrong = runner.invoke(app, ["rewards", "verify", str(path), "--key", str(key)])
    assert wrong.exit_code == 1 and "line 1" in wrong.output
    none = runner.invoke(app, ["rewards", "verify", str(path)])
    assert none.exit_code == 1 and "--public-key" in none.output
    assert runner.invoke(app, ["rewards", "verify", str(path), "--key-env", "PATCHKIT_TEST_KEY"]).exit_code == 1
    key.write_bytes(SECRET)
    good = runner.invoke(app, ["rewards", "verify", str(path), "--key", str(key)])
    assert good.exit_code == 0 and "6 verdicts, all signed" in good.output and "exact_answer: 6" in good.output
    found = json.loads(runner.invoke(app, ["rewards", "verify", str(path), "--key", str(key), "--json"]).stdout)
    assert found["verdicts"] == 6 and found["mean_reward"] == 0.5


def test_signing_and_checking_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, patchkit.rl.reward; print(sorted({'torch', 'transformers', 'cryptography', 'jsonschema'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stderr


# -- verifiers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "completion", "answer", "wanted"),
    [
        ({}, " 42\n", "42", 1.0), ({}, "42.", "42", 0.0), ({}, "", "42", 0.0),
        ({"marker": "####"}, "because #### 41 and so #### 42 ", "42", 1.0), ({"marker": "####"}, "42", "42", 0.0),
        ({"as_number": True}, "1,000", "1000.0", 1.0), ({"as_number": True}, "0.5", "1/2", 1.0), ({"as_number": True}, "nan", "1", 0.0),
        ({"as_number": True}, "1e999999999", "1", 0.0), ({"as_number": True}, "1/0", "1", 0.0),
        ({"as_number": True}, "9" * 10**6, "1", 0.0),
        ({}, [{"role": "assistant", "content": "42"}], "42", 1.0), ({}, [{"role": "assistant", "content": None}], "42", 0.0),
        ({}, [{"role": "assistant", "content": [{"type": "text", "text": "42"}]}], 42, 1.0),
    ],
)  # fmt: skip
def test_exact_answers(options: dict[str, Any], completion: Any, answer: Any, wanted: float) -> None:
    assert ExactAnswer(**options)("?", completion, answer=answer, other=3) == wanted


def test_an_answer_that_is_not_there_is_no_zero() -> None:
    with pytest.raises(RewardError, match="no column 'answer'"):
        ExactAnswer()("?", "42", solution="42")
    with pytest.raises(RewardError, match="is no number"):
        ExactAnswer(as_number=True)("?", "42", answer="forty-two")


def test_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = MatchesPattern(r"\d{4}-\d\d(\n.*)?")
    assert [verifier("", text) for text in ("2026-11", "2026-11\nand", "x 2026-11", "2026-1", "")] == [1.0, 1.0, 0.0, 0.0, 0.0]
    with pytest.raises(RewardError, match="does not read"):
        MatchesPattern("(")
    monkeypatch.setattr(verifiers, "_SECONDS", 0.01)
    with pytest.raises(RewardError, match=r"takes over 0\.01 s"):
        MatchesPattern("(a|aa)+$b")("", "a" * 40)


SCHEMA = {
    "type": "object",
    "properties": {"b": {"type": "integer"}, "a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_schemas() -> None:
    pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install 'patchkit[rl]'")
    verifier = MatchesSchema(SCHEMA)
    texts = ['{"a": "x", "b": 1}', '{"b": 1, "a": "x"}', ' {"a":""}\n', '{"a": 1}', '{"a": "x"', '{"a": "x", "c": 2}', "NaN", "[" * 100_000]
    assert [verifier("", text) for text in texts] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert MatchesSchema({"type": "number"})("", "Infinity") == 0.0
    with pytest.raises(RewardError, match="no JSON schema"):
        MatchesSchema({"type": "objekt"})
    with pytest.raises(RewardError, match="is not in it"):
        MatchesSchema({"$ref": "https://example.com/schema.json"})("", "1")


def test_verifiers_do_not_run_what_a_model_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "__import__('os').system('touch owned')"
    assert ExactAnswer(as_number=True)("", text, answer="1") == 0.0 and MatchesPattern("1")("", text) == 0.0
    assert not list(tmp_path.iterdir())
    random.seed(0)
    for _ in range(200):
        noise = "".join(chr(random.randrange(1, 0x3000)) for _ in range(random.randrange(40)))
        assert ExactAnswer(marker="#", as_number=True)("", noise, answer="1") in (0.0, 1.0)
