"""evals/serving: its arguments and arithmetic, and that a section that fails becomes a file with the reason."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="a server needs patchkit[serve]")

from evals.serving import __main__ as command
from evals.serving.client import Answer, _take
from evals.serving.figures import Bar, Burst, compared, gap_ratio, growth, percentile
from evals.serving.fuzz import broken_body, is_error
from evals.serving.servers import DidNotStart, Server, Way


def test_arguments() -> None:
    sections, out, options = command.options_of(["--sections", "small", "drain", "--rounds", "2", "--minutes", "0.5", "--out", "there"])
    assert sections == ["small", "drain"] and out == Path("there")
    assert (options.rounds, options.minutes, options.clients, options.tokens, options.prompt) == (2, 0.5, 8, 64, 4096)
    assert command.options_of([])[0] == ["small", "smollm2", "alone", "arrival", "drain", "fuzz", "soak"]
    for wrong in (["--sections", "large"], ["--rounds", "0"], ["--minutes", "0"]):
        with pytest.raises(SystemExit):
            command.options_of(wrong)


def test_percentiles_gaps_and_growth() -> None:
    values = random.Random(0).sample(range(1, 101), 100)
    assert [percentile(values, share) for share in (0.0, 0.5, 0.95, 1.0)] == [1, 50, 95, 100] and percentile([7], 0.95) == 7
    assert gap_ratio([1.0, 1.0, 2.0, 1.0, 5.0]) == 5.0
    assert growth([50] * 25 + [100] * 65 + [103] * 10) == pytest.approx(0.03)
    assert growth([100, 100]) == 0
    for call in (lambda: percentile([], 0.5), lambda: gap_ratio([1.0])):
        with pytest.raises(ValueError):
            call()


def test_ratios_are_of_the_same_round() -> None:
    def burst(seconds: float, first: float, texts: str = "ab") -> Burst:
        return Burst(seconds, 100, (first, first / 2), tuple(texts))

    bursts = {"ours": [burst(1, 0.1), burst(10, 1.0), burst(1, 0.1)], "theirs": [burst(2, 0.4), burst(20, 4.0), burst(3, 0.3, "ax")]}
    found = compared(bursts, "ours")
    assert found["ours"]["tokens_per_second"] == 100 and found["ours"]["ours_over_this"]["value"] == 1
    theirs = found["theirs"]
    assert theirs["ours_over_this"]["value"] == 2 and theirs["first_token_p95_ours_over_this"]["value"] == pytest.approx(0.25)
    assert theirs["first_token_p50_ms"] == 300 and theirs["first_token_p95_ms"] == 4000
    assert theirs["texts_equal_to_ours"] == "5 of 6" and theirs["tokens"] == [100] * 3


def test_events_of_any_server() -> None:
    answer = Answer(200, 0.0)
    for event in (
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"index": 0, "text": "a", "finish_reason": None}], "usage": None},
        {"choices": [{"index": 1, "text": "x"}]},
        {"choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"completion_tokens": 2}},
    ):
        _take(answer, event)
    assert (answer.text, answer.tokens, answer.finish, len(answer.times), len(answer.gaps)) == ("ab", 2, "length", 2, 1)


def test_broken_bodies_and_their_answers() -> None:
    chance = random.Random(1)
    bodies = [broken_body(chance) for _ in range(200)]
    assert {path for path, _, _ in bodies} == {"/v1/chat/completions", "/v1/completions"} and len({data for _, data, _ in bodies}) > 150
    good: dict[str, Any] = {"message": "no", "type": "x", "param": None, "code": None}
    assert is_error(json.dumps({"error": good}).encode())
    for wrong in (b"", b"[]", b'{"error": "no"}', json.dumps({"error": {**good, "more": 1}}).encode(), b'{"detail": "no"}'):
        assert not is_error(wrong)


def test_what_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(DidNotStart, match="make serving-peers"), Server(Way("none", (str(tmp_path / "no-such-file"),)), tmp_path):
        pass
    with (
        pytest.raises(DidNotStart, match="status 3: out of luck"),
        Server(Way("ends", ("/bin/sh", "-c", "echo out of luck; exit 3")), tmp_path, patience=20),
    ):
        pass


def test_sections_write_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def good(options: Any) -> dict[str, Any]:
        return {"what": "a", "bars": [Bar("rate", 3.0, 2.5, True).row(), Bar("gap", 2.0, 3.0, False).row()]}

    def bad(options: Any) -> dict[str, Any]:
        raise RuntimeError("no server")

    monkeypatch.setattr(command, "SECTIONS", {"good": good, "bad": bad})
    paths = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert command.main(["--sections", "good", *paths]) == 0
    assert command.main(["--sections", "bad", "good", *paths]) == 1
    written = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("good", "bad")}
    assert [bar["holds"] for bar in written["good"]["bars"]] == [True, True] and written["bad"]["failed"] == "RuntimeError: no server"
    assert written["good"]["environment"]["threads"] == 2 and "cpu_flags" in written["good"]["environment"]
    assert "holds  rate: 3 (>= 2.5)" in capsys.readouterr().out
    assert not Bar("rate", 2.0, 2.5, True).holds and not Bar("gap", 3.5, 3.0, False).holds
