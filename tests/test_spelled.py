"""Spec strings of the real patches and of the objects that their options take: all options read back, quoted or not."""

from __future__ import annotations

import dataclasses
import enum
import re
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from patchkit import Patch, StreamingLLM, available_patches, parse_spec
from patchkit.errors import SpecError
from patchkit.linear.state import StateDict
from patchkit.patches.speculative import Speculative
from patchkit.registered import Registered
from patchkit.spec import check_spelling
from patchkit.speculation import Adaptive, Drafter, Eagle, Fixed, Medusa, PromptLookup, SelfDraft, TopKAgree
from patchkit.speculation.acceptance import Acceptance
from patchkit.speculation.controllers import Controller
from patchkit.spelled import Spelled, is_word, options_of, parse_object, spell

PATCHES = [cls for cls in available_patches().values() if cls.__module__.startswith("patchkit.")]
KINDS = (Acceptance, Controller, Drafter)
OBJECTS = [cls for kind in KINDS for cls in kind.available().values() if cls.__module__.startswith("patchkit.")]
VALUES = (0, 1, 3, 128, 4096, 0.25, 2.5, "a_word", "two words", "org/name", (1, 2), (1,), ("*.a", "b"), ["a", 0.5], ((0,), (0, 0)))


def samples(cls: type[Spelled], option: str) -> Iterator[Any]:
    """Values that an option may take: every choice of its type, words that the documentation quotes, objects, and what VALUES has."""
    field = options_of(cls)[option]
    if isinstance(field.default, bool):
        yield not field.default
        return
    yield from VALUES
    yield from re.findall(r'"([\w-]+)"', cls.__doc__ or "")
    hint = typing.get_type_hints(cls)[option]
    yield from typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    objects = field.metadata.get("objects", ())
    for each in (objects() if callable(objects) else {each.name: each for each in objects}).values():
        if issubclass(each, Patch):
            yield parse_spec(each.example)[0]
        elif hasattr(each, "example"):
            yield (parse_object(each.example, "object", [each]), parse_object(each.example, "object", [each]))
            yield from with_each_option(each)
        else:
            yield each()


def read_example(cls: type[Any]) -> Any:
    return parse_spec(cls.example)[0] if issubclass(cls, Patch) else parse_object(cls.example, "object", [cls])


def with_each_option(cls: type[Any]) -> Iterator[Any]:
    """The example of ``cls``, with each value of each option that it accepts."""
    example = read_example(cls)
    yield example
    for option in options_of(cls):
        accepted = []
        for value in samples(cls, option):
            try:
                accepted.append(dataclasses.replace(example, **{option: value}))
            except (TypeError, ValueError):
                continue
        assert any(getattr(each, option) != getattr(example, option) for each in accepted), f"no value of {cls.name}({option}=) is tried"
        yield from accepted


@pytest.mark.parametrize("cls", PATCHES + OBJECTS, ids=lambda cls: cls.name)
def test_every_option_reads_back(cls: type[Any]) -> None:
    tried = [given for given in with_each_option(cls) if "<" not in given.spec]  # no spec string holds tensors
    assert len(tried) > len(options_of(cls))
    for given in tried:
        again = parse_spec(given.spec)[0] if isinstance(given, Patch) else cls_of_spec(given)
        assert again == given and again.spec == given.spec
        assert '"' not in given.spec.replace("'", ""), given.spec  # no object is in quotes


def cls_of_spec(given: Any) -> Any:
    return Fixed(int(given.spec)) if isinstance(given, Fixed) else parse_object(given.spec, "object", [type(given)])


@pytest.mark.parametrize(
    ("text", "quoted", "expected"),
    [
        ("k=adaptive(target=0.6)", 'k="adaptive(target=0.6)"', dict(k=Adaptive(0.6))),
        ("k=adaptive(0.6, window=4)", "k='adaptive(0.6, window=4)'", dict(k=Adaptive(0.6, 4))),
        ("k=4", "k='4'", dict(k=Fixed(4))),
        ("k=fixed(4)", "k='fixed(k=4)'", dict(k=4)),
        ("acceptance=topk_agree(2)", "acceptance='topk_agree(2)'", dict(acceptance=TopKAgree(2))),
        ("acceptance=topk_agree(k=2)", 'acceptance="topk_agree(2)"', dict(acceptance="topk_agree(2)")),
        ("draft=prompt_lookup(3, 1)", "draft='prompt_lookup(3, min_ngram=1)'", dict(draft=PromptLookup(3, 1))),
        ("draft=eagle", "draft='eagle'", dict(draft=Eagle("bundled"))),
        ("draft=eagle()", "draft='eagle()'", dict(draft=Eagle())),
        ("draft=eagle('a.safetensors')", """draft='eagle("a.safetensors")'""", dict(draft=Eagle("a.safetensors"))),
        ("draft=medusa(init=random)", "draft='medusa(init=\"random\")'", dict(draft=Medusa(init="random"))),
        ("draft=small", "draft='small'", dict(draft="small")),
        (
            "draft=[prompt_lookup, eagle(), 'a/b']",
            "draft=['prompt_lookup', 'eagle()', 'a/b']",
            dict(draft=[PromptLookup(), Eagle(), "a/b"]),
        ),
        ("draft=prompt_lookup + eagle", "draft=('prompt_lookup', 'eagle')", dict(draft=(PromptLookup(), "eagle"))),
        (
            "draft=self_draft(streaming(window=8) + mlp_int8)",
            "draft=self_draft('streaming(window=8) + mlp_int8')",
            dict(draft=SelfDraft([StreamingLLM(window=8), "mlp_int8"])),
        ),
    ],
)
def test_quoted_and_unquoted_objects_are_the_same(text: str, quoted: str, expected: dict[str, Any]) -> None:
    assert parse_spec(f"speculative({text})") == parse_spec(f"speculative({quoted})") == [Speculative(**expected)]
    assert parse_spec(Speculative(**expected).spec) == [Speculative(**expected)]


@pytest.mark.parametrize(
    ("given", "spec"),
    [
        (Speculative(), "speculative"),
        (Speculative(draft="eagle", k="adaptive(target=0.6)", acceptance="topk_agree(2)"),
         "speculative(draft=eagle, k=adaptive(target=0.6), acceptance=topk_agree(k=2))"),
        (Speculative(draft=Eagle(), k=4), "speculative(draft=eagle(), k=4)"),
        (Speculative(draft="org/name"), "speculative(draft='org/name')"),
        (Speculative(draft=SelfDraft("streaming(window=8)")), "speculative(draft=self_draft(patches=(streaming(window=8),)))"),
    ],
)  # fmt: skip
def test_the_spec_is_written_without_quotes(given: Patch, spec: str) -> None:
    assert given.spec == spec and parse_spec(spec) == [given]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acceptance=topk_agre(2)", "unknown acceptance of speculative 'topk_agre', did you mean 'topk_agree'\\?"),
        ("acceptance='topk_agre(2)'", "unknown acceptance 'topk_agre', did you mean 'topk_agree'\\?"),
        ("acceptance=topk_agree", "topk_agree needs k: write topk_agree\\(k=...\\)"),
        ("acceptance=topk_agree(1, 2)", "topk_agree takes k, and 2 values are given"),
        ("acceptance=topk_agree(2, k=2)", "option 'k' is given twice"),
        ("acceptance=topk_agree(*two)", "'\\*two' is given without its option's name"),
        ("acceptance=topk_agree(**two)", "'\\*\\*' is not allowed"),
        ("acceptance=exact(2)", "exact: '2' is given without its option's name: write exact\\(option=value\\), options: none"),
        ("acceptance=typical(two)", "typical\\(p='two'\\): give a probability"),
        ("k=adaptive(targt=0.5)", "unknown option of adaptive 'targt', did you mean 'target'\\?"),
        ("k=adaptive(target=5)", "adaptive\\(target=5\\): target is 5: give an acceptance rate"),
        ("k=[4]", "k is \\[4\\]: give a number of drafts"),
        ("draft=eagel('x')", "unknown draft of speculative 'eagel', did you mean 'eagle'\\?"),
        ("draft='eagel(4)'", "unknown draft 'eagel', did you mean 'eagle'\\?"),
        ("draft='eagle(4))'", "cannot read the draft 'eagle\\(4\\)\\)'"),
        ("draft=eagle(open('x'))", "eagle: heads=open\\('x'\\) is not a literal"),
        ("draft=some.name", "unknown draft of speculative 'some.name'"),
        ("draft=[prompt_lookup, eagel(2)]", "unknown draft of speculative 'eagel'"),
        ("draft=self_draft(streming)", "unknown patches of self_draft 'streming', did you mean 'streaming'\\?"),
        ("draft=self_draft(streaming(widow=8))", "unknown option of streaming 'widow', did you mean 'window'\\?"),
    ],
)
def test_bad_objects_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(f"speculative({text})")


@dataclasses.dataclass(frozen=True)
class Anything(Spelled):
    """An object of one option, which takes any value."""

    name: typing.ClassVar[str] = "anything"

    value: Any = None


class Colour(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    "value",
    [float("inf"), -float("inf"), (1, float("inf")), {"a": float("inf")}, {"a": "two words", 3: [True, None]}, np.float64(0.5), 1e22,
     Colour.RED, Level.HIGH, "\ufb01x", "\u212b", "None", "1e999"],
    ids=repr,
)  # fmt: skip
def test_any_value_that_a_literal_can_write_reads_back(value: Any) -> None:
    assert parse_object(Anything(value).spec, "object", [Anything]).value == value


def test_what_no_literal_can_write_is_shown_by_its_class() -> None:
    assert spell(float("nan")) == "<float>" and spell({"a": 1j}) == "{a: <complex>}"
    assert spell(StateDict(a=1)) == "<state dict>"
    assert is_word("fix") and not is_word("\ufb01x")


@pytest.mark.parametrize("text", ["streaming" + "()" * 1500, "streaming(refresh=" + "-" * 900 + "1)"], ids=len)
def test_a_spec_that_is_nested_too_deep_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="nested too deep"):
        parse_spec(text)
    with pytest.raises(SpecError, match="nested too deep"):
        parse_object(text, "object", available_patches)


def test_a_long_name_that_is_nested_too_deep_is_refused_before_patches_are_imported() -> None:
    with pytest.raises(SpecError, match="nested too deep"):
        check_spelling("streaming" + "()" * 1500)


def test_a_class_with_slots_is_the_one_that_a_spec_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Acceptance, "_classes", {**Acceptance.available()})

    @dataclasses.dataclass(frozen=True, slots=True)
    class Slotted(Acceptance, name="slotted"):
        times: int = 1

    assert Acceptance.available()["slotted"] is Slotted
    made = parse_object("slotted(2)", "acceptance", Acceptance.available)
    assert isinstance(made, Slotted) and made.times == 2 and made.spec == "slotted(times=2)"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_the_folder_is_the_list(kind: type[Registered]) -> None:
    found = kind.available()
    assert list(found) == sorted(found) and all(cls.name == name and issubclass(cls, kind) for name, cls in found.items())
    mine = [cls for cls in found.values() if cls.__module__.startswith("patchkit.")]
    assert len(mine) >= 3 and all(cls.__module__ == f"{kind.folder}.{cls.name}" for cls in mine)
    assert all(cls.__doc__ and cls.example.partition("(")[0] == cls.name for cls in mine)
