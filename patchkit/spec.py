"""Spec strings such as "streaming(sinks=4, window=1020) + mlp_int8"."""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from patchkit.errors import PatchConflict, SpecError
from patchkit.patch import NO_PATCH, Patch, available_patches, declared
from patchkit.spelled import keywords_of, listed, made, refuse_unnamed, refusing_depth, summands, unknown

T = TypeVar("T")

# What names patches: an object, a spec string, or a file that holds one.
Given = Patch | str | os.PathLike[str]


def parse_spec(text: str) -> list[Patch]:
    """Read a spec string: `streaming(sinks=4, window=1020) + mlp_int8`.

    Option values are Python literals (int, float, string, list, tuple, dict, None, True, False); a bare word is a string. Options that
    take objects are written as calls: `streaming(refresh=reencode(every=64))`, `speculative(k=adaptive(target=0.8), draft=eagle)`;
    `patchkit.spelled` has the grammar. `none` is no patch, and `@FILE` is the spec in that file (`read_spec`).

    Raises:
        SpecError: bad syntax, an unknown patch or option (with the nearest valid name), or a value that the patch refuses.
    """
    return read_spec(text.strip()[1:]) if text.strip().startswith("@") else _parsed(text)


def read_spec(path: str | os.PathLike[str]) -> list[Patch]:
    """Read the spec string in a UTF-8 file, such as `patchkit tune` writes: over one line or several, with comments after `#`.

    Raises:
        SpecError: the file cannot be read, or its text is no spec.
    """
    return _in_file(path, _parsed)


def resolve(patches: Sequence[Any]) -> list[Patch]:
    """Return the patch objects that the user's objects, specs, files and lists of these name, in the order of application."""
    if not any(True for _ in _flat(patches)):
        raise SpecError(f"no patch given: name at least one, available: {', '.join(available_patches())}, or {NO_PATCH!r}")
    chosen: list[Patch] = []
    for given in _flat(patches):
        if isinstance(given, str):
            chosen.extend(parse_spec(given))
        elif isinstance(given, os.PathLike):
            chosen.extend(read_spec(given))
        elif isinstance(given, type) and issubclass(given, Patch):
            raise SpecError(f"{given.__name__} is a class: write {given.__name__}()")
        elif not isinstance(given, Patch):
            raise SpecError(f"{given!r} is not a patch: give a Patch object, or a spec string such as 'streaming(window=1020)'")
        elif not hasattr(given, "name"):
            raise SpecError(f"{type(given).__name__} is not registered: decorate the class with @register_patch('a_name')")
        else:
            chosen.append(given)
    names = [patch.name for patch in chosen]
    for name in names:
        if names.count(name) > 1:
            raise PatchConflict(f"the patch {name!r} is given {names.count(name)} times: give it once")
    return sorted(chosen, key=lambda patch: patch.stage)


def _flat(patches: Sequence[Any]) -> Iterator[Any]:
    for given in patches:
        if isinstance(given, list | tuple):
            yield from _flat(given)
        else:
            yield given


def check_spelling(text: str) -> None:
    """Raise what `parse_spec` raises about syntax and about the names of patches and options, within a moment.

    Patches take seconds to import, so their names and options are read in their source. What this lets pass may still be wrong: values
    are for `parse_spec`.

    Raises:
        SpecError: bad syntax, or an unknown patch or option.
    """
    known = declared()
    if known is None:
        return
    if text.strip().startswith("@"):
        _in_file(text.strip()[1:], functools.partial(_check_names, known=known))
    else:
        _check_names(text, known)


def _in_file(path: str | os.PathLike[str], read: Callable[[str], T]) -> T:
    try:
        return read(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"the spec file {os.fspath(path)!r} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"the spec file {os.fspath(path)!r} is not UTF-8 text: give one that `patchkit tune` wrote") from error
    except SpecError as error:
        raise SpecError(f"the spec file {os.fspath(path)!r}: {error}") from error


def _parsed(text: str) -> list[Patch]:
    with refusing_depth("spec"):
        return [_patch_of(node, text) for node in _terms(text, available_patches())]


def _terms(text: str, known: Iterable[str]) -> list[ast.expr]:
    """The terms that a spec joins with '+'; an empty list for the spec of no patch."""
    try:
        # In brackets, so that a spec may run over several lines (YAML).
        tree = ast.parse(f"({text.strip()}\n)", mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SpecError(
            f"cannot read the spec {text!r}: {getattr(error, 'msg', error)}. "
            "Write it like 'streaming(sinks=4, window=1020) + mlp_int8', and quote values that are not single words"
        ) from None
    if isinstance(tree.body, ast.Tuple) and not tree.body.elts:  # nothing, or nothing but comments
        raise SpecError(f"empty spec: name at least one patch, or write none; available: {listed(known)}")
    if isinstance(tree.body, ast.Name) and tree.body.id == NO_PATCH:
        return []
    return summands(tree.body)


def _check_names(text: str, known: dict[str, tuple[str, ...] | None]) -> None:
    with refusing_depth("spec"):
        for node in _terms(text, known):
            name = _name_of(node, text, known)
            options = known[name]
            if options is not None and isinstance(node, ast.Call):
                refuse_unnamed(name, node.args, options)
                keywords_of(name, node, options)


def _patch_of(node: ast.expr, text: str) -> Patch:
    patches = available_patches()
    return made(patches[_name_of(node, text, patches)], node)


def _name_of(node: ast.expr, text: str, known: Iterable[str]) -> str:
    word = node.func if isinstance(node, ast.Call) else node
    if not isinstance(word, ast.Name):
        raise SpecError(
            f"{ast.unparse(node)!r} in the spec {text!r} is not a patch: join patches with '+', like 'streaming(window=1020) + mlp_int8'"
        )
    if word.id not in known:
        raise SpecError(unknown("patch", word.id, known))
    return word.id
