"""The documents: links lead somewhere, the README is short, every error is in docs/troubleshooting.md, every public name has a page."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

import pytest

from patchkit import available_patches, errors
from patchkit.cli.common import UsageError
from patchkit.cli.tables import fill, filled_in, tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place), target


def test_every_error_has_a_cause_and_a_remedy() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.PatchError)]
    assert len(classes) > 5
    for each in classes:
        assert each is errors.PatchError or f"## {each.__name__}\n" in text, each.__name__


@pytest.mark.parametrize(("page", "held"), [("README.md", {"patches"}), ("docs/patches.md", set(tables()))])
def test_tables_are_those_of_the_registries(page: str, held: set[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == held
    assert filled_in(text) == text, f"run: patchkit patches --markdown {page}"


def test_a_table_has_a_row_for_every_class_and_goes_where_its_place_is(tmp_path: Path) -> None:
    known = available_patches()
    assert all(len(tables()[name].splitlines()) == 2 + len(known) for name in ("patches", "options"))
    assert all(f"| `{name}` |" in tables()["patches"] for name in known)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: patches -->\nold\n<!-- end of table -->\nafter\n", encoding="utf-8")
    assert fill(page) and not fill(page)
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "\n".join(lines[3:-3]) + "\n" == tables()["patches"]
    for text, message in (("no table\n", "has no place for a table"), ("<!-- table: x -->\n<!-- end of table -->", "no table 'x'")):
        page.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=message):
            fill(page)
    with pytest.raises(UsageError, match="cannot be read"):
        fill(tmp_path / "missing.md")


def test_the_readme_and_the_glossary_are_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
    rows = [line for line in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) - 1 <= 30


def test_the_reading_guide_names_what_exists() -> None:
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\d+\. .*\n(?:   .*\n)*", text, re.MULTILINE)
    assert len(steps) > 12
    for path in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / path).exists() or (ROOT / "patchkit" / path).exists(), path
    for step in steps:
        code = "".join((ROOT / "patchkit" / path).read_text(encoding="utf-8") for path in re.findall(r"`([\w/]+\.py)`", step))
        for name in re.findall(r"`(\w+)\(\)`", step):
            assert f"def {name}(" in code, f"{name} is in no file of this step: {step}"
        for name in re.findall(r"`([A-Z]\w+)`", step):
            assert f"class {name}" in code or f"class {name}" in (ROOT / "patchkit" / "patch.py").read_text(encoding="utf-8"), name


def test_the_site_has_a_page_for_every_public_name() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["public_names"]()
    assert set(pages) == {"patchkit", "patchkit.rl", "patchkit.serving", "patchkit.speculation", "patchkit.testing"}
    for name, paths in pages.items():
        module = importlib.import_module(name)
        exported = set(re.findall(r"import (\w+) as \1$", Path(module.__file__ or "").read_text(encoding="utf-8"), re.MULTILINE))
        exported |= set(getattr(module, "__all__", ()))
        assert exported and not exported - set(paths), name
        for public, path in paths.items():
            home, _, attribute = path.rpartition(".")
            assert getattr(importlib.import_module(home), attribute) is getattr(module, public), path
