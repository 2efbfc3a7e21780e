"""`patchkit generate`: chat, the ends of texts, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from smollm2 import needs_smollm2
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from patchkit import SpecError, available_patches, patch, spec, spelled, system_tokens
from patchkit.cli import app
from patchkit.models import load_model
from patchkit.speculation.stop_texts import Printer, StopsAt, before_stop

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "def read(path):\n    with open(path) as file:\n        return"
# As those of many models, it begins with the token that begins a text, and knows no other roles.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user') %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)


def run_json(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refusal(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 1 and result.stdout == "" and "Traceback" not in result.stderr, result.output
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def chat_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(model_dir, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def continued(path: Path, text: str, tokens: int, add_special_tokens: bool, **options: Any) -> tuple[Any, list[int], int]:
    """The tokenizer, what the model in ``path`` writes after ``text``, and the number of tokens of that."""
    model, tokenizer = load_model(path)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens)["input_ids"]
    output = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, **options)
    return tokenizer, output[0, ids.shape[1] :].tolist(), ids.shape[1]


# -- chat --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_writes_what_the_template_says_and_no_second_bos(system: str | None, chat_dir: Path) -> None:
    extra = () if system is None else ("--system", system)
    found = run_json(chat_dir, "--prompt", PROMPT, "--max-new-tokens", "20", *extra)
    _, tokenizer = load_model(chat_dir)
    written = f"{tokenizer.bos_token}{'' if system is None else f'[system] {system}' + chr(10)}[user] {PROMPT}\n[answer]"
    _, new, prompt_tokens = continued(chat_dir, written, 20, add_special_tokens=False)
    assert found["chat"] is True and found["system"] == system and found["prompt"] == PROMPT
    assert found["text"] == tokenizer.decode(new, skip_special_tokens=True) and found["prompt_tokens"] == prompt_tokens


def test_chat_is_for_models_that_have_a_template(chat_dir: Path, model_dir: Path) -> None:
    options = ("--prompt", PROMPT, "--max-new-tokens", "12")
    raw = run_json(chat_dir, *options, "--raw")
    _, new, prompt_tokens = continued(chat_dir, PROMPT, 12, add_special_tokens=True)
    assert raw["chat"] is False and raw["new_tokens"] == len(new) and raw["prompt_tokens"] == prompt_tokens
    # The same weights without a template: nothing changes for them.
    assert run_json(model_dir, *options)["text"] == raw["text"] != run_json(chat_dir, *options)["text"]
    assert "no chat template" in refusal(model_dir, *options, "--chat") and "--chat" in refusal(model_dir, *options, "--chat")
    assert "system_tokens" in refusal(chat_dir, *options, "--patches", "streaming(sinks=system, window=20)")
    assert "leave --system out" in refusal(model_dir, *options, "--system", "x")
    assert "--raw" in refusal(chat_dir, *options, "--system", "x", "--raw")


def test_sinks_of_a_system_message_are_its_tokens(chat_dir: Path) -> None:
    text = "Be brief, and never say more than a word."
    tokenizer = AutoTokenizer.from_pretrained(chat_dir)
    sinks = system_tokens(tokenizer, text)
    chats = [[{"role": "system", "content": text}, {"role": "user", "content": asked}] for asked in ("One", "two")]
    first, second = (tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"] for chat in chats)
    assert first[:sinks] == second[:sinks] and text in tokenizer.decode(first[:sinks])
    options = ("--prompt", PROMPT, "--system", text, "--max-new-tokens", "40", "--ignore-eos")
    by_name = run_json(chat_dir, *options, "--patches", "streaming(sinks = 'system', window=12)")
    by_number = run_json(chat_dir, *options, "--patches", f"streaming(sinks={sinks}, window=12)")
    assert by_name["text"] == by_number["text"] != run_json(chat_dir, *options, "--patches", "streaming(sinks=1, window=12)")["text"]


def test_a_template_that_refuses(chat_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "strict"
    shutil.copytree(chat_dir, path)
    (path / "chat_template.jinja").write_text(TEMPLATE.replace("'system', ", ""))
    assert run(path, "--prompt", "a", "--max-new-tokens", "1").exit_code == 0
    says = refusal(path, "--prompt", "a", "--system", "b")
    assert "no such role" in says and "leave --system out" in says


def test_what_is_printed(chat_dir: Path) -> None:
    patches = ("--patches", "streaming(sinks=2, window=24)")
    plain = run(chat_dir, "--prompt", PROMPT, *patches, "--max-new-tokens", "40")
    found = run_json(chat_dir, "--prompt", PROMPT, *patches, "--max-new-tokens", "40")
    assert plain.stdout.rstrip("\n") == found["text"].rstrip("\n")
    hits = found["patches"][0]["hits"]
    # The last token is not fed.
    assert hits["tokens evicted"] == found["prompt_tokens"] + found["new_tokens"] - 1 - 26 > 0
    assert f"{found['new_tokens']} tokens in" in plain.stderr and f"tokens evicted {hits['tokens evicted']}" in plain.stderr


# -- the ends of texts ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(model_dir: Path) -> tuple[Any, list[int]]:
    """The tokenizer, and 40 tokens after the prompt, whatever the model takes for an end."""
    tokenizer, new, _ = continued(model_dir, PROMPT, 40, add_special_tokens=True, eos_token_id=-1)
    return tokenizer, new


@pytest.fixture(scope="module")
def ending_dir(model_dir: Path, plain: tuple[Any, list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, for which two of the tokens that it writes end a text; the second comes first."""
    path = tmp_path_factory.mktemp("models") / "ending"
    shutil.copytree(model_dir, path)
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [plain[1][30], plain[1][12]]}))
    return path


def test_it_ends_at_any_of_the_models_ends(ending_dir: Path, plain: tuple[Any, list[int]]) -> None:
    tokenizer, new = plain
    found = run_json(ending_dir, "--prompt", PROMPT, "--max-new-tokens", "40")
    end = next(index for index, token in enumerate(new) if token in (new[12], new[30]))
    assert found["finish"] == "eos" and found["new_tokens"] == end + 1 <= 13
    assert found["text"] == tokenizer.decode(new[: end + 1], skip_special_tokens=True)
    assert run_json(ending_dir, "--prompt", PROMPT, "--max-new-tokens", "1")["finish"] == ("eos" if end == 0 else "length")


@pytest.mark.parametrize("spec", ["none", "speculative(k=3)"])
def test_ignore_eos(spec: str, ending_dir: Path, plain: tuple[Any, list[int]]) -> None:
    tokenizer, new = plain
    found = run_json(ending_dir, "--prompt", PROMPT, "--max-new-tokens", "40", "--ignore-eos", "--patches", spec)
    assert found["finish"] == "length" and found["new_tokens"] == 40
    assert found["text"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("spec", ["none", "speculative(k=3)", "linear(window=24)"])
def test_stop(spec: str, model_dir: Path, tmp_path: Path) -> None:
    options = ("--prompt", PROMPT, "--patches", spec, "--max-new-tokens", "40", "--ignore-eos")
    whole = run_json(model_dir, *options)
    text = whole["text"]
    # The beginning of something that comes, a text that never comes, and one that does, in the middle of words.
    stops = ("--stop", text[20:23] + "\0", "--stop", "never\0", "--stop", text[21:25])
    found, printed = run_json(model_dir, *options, *stops), run(model_dir, *options, *stops)
    assert found["text"] == text[: text.index(text[21:25])] and printed.stdout == found["text"] + "\n"
    assert found["finish"] == "stop" and found["new_tokens"] < whole["new_tokens"] == 40


def test_stop_is_not_looked_for_in_the_prompt(model_dir: Path) -> None:
    options = ("--prompt", PROMPT, "--max-new-tokens", "6")
    text = run_json(model_dir, *options)["text"]
    assert run_json(model_dir, *options, "--stop", "return" + text[:1])["text"] == text
    assert run_json(model_dir, *options, "--stop", "return")["finish"] == "length"


@pytest.mark.parametrize("spec", ["none", "speculative(draft=eagle, k=4)"])
def test_grammars(spec: str, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema, lark, ebnf = (tmp_path / name for name in ("schema.json", "grammar.lark", "grammar.ebnf"))
    schema.write_text(json.dumps({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}))
    lark.write_text('start: "a" | "b"')
    ebnf.write_text('root ::= "c" | "d"')
    options = ("bundled", "--prompt", "x = ", "--patches", spec)
    found = run_json(*options, "--json-schema", schema)
    assert type(json.loads(found["text"])["ok"]) is bool and found["finish"] == "eos" and found["constraint"] == "json_schema"
    assert run_json(*options, "--regex", "[0-9]{3}!")["text"][3:] == "!"
    assert run_json(*options, "--grammar", lark)["text"] in ("a", "b")
    assert run_json(*options, "--grammar", ebnf)["text"] in ("c", "d")
    assert run_json(*options, "--max-new-tokens", "2")["constraint"] is None
    assert "--ignore-eos" in refusal(*options, "--regex", "a", "--ignore-eos")
    schema.write_text("{")
    assert "is not JSON" in refusal(*options, "--json-schema", schema) and "unclosed" in refusal(*options, "--regex", "(")


class Words:
    """A tokenizer whose tokens are characters."""

    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return ["".join(map(chr, row)) for row in rows.tolist()]


def test_each_row_stops_by_itself() -> None:
    stops = StopsAt(Words(), ["ab", "xyz"], prompt_tokens=2)
    rows = torch.tensor([[*map(ord, row)] for row in ("ab" + "c" * 40 + "ab", "cc" + "ab" + "c" * 40, "ab" + "c" * 39 + "xyz")])
    # The second one's lies further back than one token can have completed it.
    assert stops(rows, None).tolist() == [True, False, True]


@pytest.mark.parametrize(
    "pieces, stops, shown",
    [
        (["one ", "two ", "three"], [], "one two three"),
        (["one <", "/e", "nd> two"], ["</end>"], "one "),
        (["one <", "/en", "tity> ", "two"], ["</end>"], "one </entity> two"),
        (["a <", "/e"], ["</end>"], "a </e"),
        (["", "aab"], ["ab"], "a"),
        (["x12", "3", "4"], ["234", "123"], "x"),
        (["stop", "more"], ["stop"], ""),
    ],
)
def test_pieces_are_printed_up_to_the_stop(pieces: list[str], stops: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(Words(), stops)
    for index, piece in enumerate(pieces):
        printer.on_finalized_text(piece, stream_end=index == len(pieces) - 1)
        # Nothing is taken back, and nothing is printed that may have to be.
        out = capsys.readouterr().out
        assert shown.startswith(out.rstrip("\n")), out
        shown = shown[len(out.rstrip("\n")) :]
    assert shown == "" and out.endswith("\n")


def test_before_stop() -> None:
    assert before_stop("abcabc", ["c", "ca", "b"]) == ("a", True) and before_stop("abc", ["d"]) == before_stop("abc", []) == ("abc", False)


# -- sampling and precision ----------------------------------------------------------------------------------------------------------


def test_top_p_narrows_what_is_sampled(model_dir: Path) -> None:
    options = ("--prompt", PROMPT, "--max-new-tokens", "16", "--temperature", "1.5")
    greedy = run_json(model_dir, "--prompt", PROMPT, "--max-new-tokens", "16")["text"]
    assert run_json(model_dir, *options, "--top-p", "0.000001")["text"] == greedy
    assert run_json(model_dir, *options, "--top-p", "1")["text"] == run_json(model_dir, *options)["text"] != greedy


@pytest.mark.parametrize("given, is_dtype", [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"), ("auto", "bfloat16")])
def test_dtypes(given: str, is_dtype: str, model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "half"
    shutil.copytree(model_dir, path)
    load_model(model_dir, torch.bfloat16)[0].save_pretrained(path)
    assert run_json(path, "--prompt", PROMPT, "--max-new-tokens", "1", "--dtype", given)["dtype"] == f"torch.{is_dtype}"


# -- errors --------------------------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "top-p without sampling": (("--top-p", "0.9"), "give a --temperature"),
    "top-p 0": (("--top-p", "0", "--temperature", "1"), "above 0"),
    "empty stop": (("--stop", ""), "--stop is empty"),
    "empty prompt": (("--prompt", " \n"), "prompt is empty"),
    "unknown patch": (("--patches", "streaming + streming"), "did you mean 'streaming'"),
    "unknown option": (("--patches", "streaming(windw=8)"), "did you mean 'window'"),
    "an option twice": (("--patches", "streaming(window=8, window=9)"), "give it once"),
    "an option without its name": (("--patches", "streaming(8)"), "option=value"),
    "bad syntax": (("--patches", "streaming(window="), "cannot read the spec"),
    "nothing but a comment": (("--patches", "# none"), "empty spec"),
    "no such spec file": (("--patches", "@none.spec"), "cannot be read"),
    "two grammars": (("--regex", "a", "--json-schema", "a.json"), "--json-schema and --regex are two grammars"),
    "no such schema": (("--json-schema", "none.json"), "none.json cannot be read"),
    "no such grammar": (("--grammar", "none.lark"), "none.lark cannot be read"),
    "missing model": (("--model", "./none"), "no such model directory"),
    "not a model": (("--model", "."), "no config.json"),
}


def test_what_needs_no_model_is_refused_before_anything_large_is_imported(tmp_path: Path) -> None:
    """One process for all: importing torch and transformers is what takes seconds, so it is what must not have happened."""
    code = """
import json, sys
from typer.testing import CliRunner
from patchkit.cli import app
for arguments in json.loads(sys.stdin.read()):
    result = CliRunner().invoke(app, arguments)
    print(json.dumps([result.exit_code, result.stdout, result.stderr, sorted({"torch", "transformers"} & {*sys.modules})]))
"""
    calls = []
    for arguments, _ in BAD.values():
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        model = given.pop("--model", "bundled")
        calls.append(["generate", model, *(word for pair in ({"--prompt": "a"} | given).items() for word in pair)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        timeout=120,
        check=True,
    )
    results = dict(zip(BAD, map(json.loads, done.stdout.splitlines()), strict=True))
    for case, (exit_code, out, err, imported) in results.items():
        assert exit_code == 1 and out == "" and imported == [], case
        assert err.startswith("error: ") and BAD[case][1] in err and len(err.splitlines()) == 1, case


def test_names_in_the_source_of_patches_are_those_of_the_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    known = available_patches()
    monkeypatch.setattr(patch, "_discovered", False)
    monkeypatch.setattr(patch, "_registry", {})
    declared = patch.declared()
    shipped = {name: cls for name, cls in known.items() if cls.__module__.startswith("patchkit.patches.")}
    # Options that a class has from another patch cannot be read from its source; they are checked once it is imported.
    assert declared == {name: tuple(spelled.options_of(cls)) if cls.__bases__ == (patch.Patch,) else None for name, cls in shipped.items()}
    spec.check_spelling("int8(scope=all)")
    with pytest.raises(SpecError, match="unknown patch"):
        spec.check_spelling("streaming + none_of_these")


def test_patches_of_users_are_known_to_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    streaming = available_patches()["streaming"]
    monkeypatch.setattr(patch, "_discovered", False)
    monkeypatch.setattr(patch, "_registry", {"of_a_user": streaming})
    spec.check_spelling("of_a_user(window=8) + mlp_int8(mode=auto)")
    with pytest.raises(SpecError, match="option of of_a_user"):
        spec.check_spelling("of_a_user(widow=8)")


# -- a real model --------------------------------------------------------------------------------------------------------------------


@needs_smollm2
def test_smollm2_answers() -> None:
    found = run_json("smollm2", "--prompt", "What is the capital of France?", "--patches", "streaming(window=252)")
    assert found["chat"] is True and found["text"] == "The capital of France is Paris." and found["finish"] == "eos"
    assert found["patches"][0]["hits"]["tokens evicted"] == 0
