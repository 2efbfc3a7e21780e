"""Single patches that a search tries first."""

from __future__ import annotations

from collections.abc import Sequence

from patchkit.anatomy.target import Target
from patchkit.errors import PatchError, SpecError
from patchkit.patch import Patch, Stage, available_patches
from patchkit.search.measurer import Objective
from patchkit.spec import parse_spec


def single_patches(
    target: Target, objective: Objective, also: Sequence[Patch] = (), without: Sequence[str] = (), tokens: int | None = None
) -> tuple[list[Patch], dict[str, str]]:
    """Return the patches to try alone, in order, and by name the patches of which nothing is tried, each with the reason.

    Each patch's first option comes before any second one; among these, exact patches come first and compilation last.

    Args:
        tokens: length of the longest sequence that is timed; options that cannot act in it (a window that holds it all) are left out.

    Raises:
        SpecError: a name in ``without`` is no patch, or a patch in ``also`` cannot be written in a spec file.
    """
    known = available_patches()
    for name in without:
        if name not in known:
            raise SpecError(f"unknown patch {name!r}: available: {', '.join(known)}")
    for patch in also:
        try:
            same = parse_spec(patch.spec) == [patch]
        except SpecError:
            same = False
        if not same:
            raise SpecError(f"{patch.spec} cannot be written in a spec file: give names and paths in the place of objects")
    ranked: list[tuple[int, Patch]] = []
    untried = {}
    for name, kind in known.items():
        given = {patch.spec: patch for patch in [*kind.candidates(target), *also] if patch.name == name}
        options = {spec: patch for spec, patch in given.items() if tokens is None or _reach(patch, target) < tokens}
        if name in without:
            untried[name] = "left out (--without)"
        elif objective == "decode" and kind.stage is Stage.GENERATION:
            untried[name] = "it acts in generate, and single steps are timed (--objective generate)"
        elif given and not options:
            untried[name] = f"none of its options acts in a text of {tokens} tokens (give a longer --context)"
        elif not options:
            untried[name] = "it declares nothing to try without options of your own (--also)"
        else:
            ranked += enumerate(options.values())
    ranked.sort(key=lambda entry: (entry[0], entry[1].stage is Stage.COMPILE, not entry[1].exact, entry[1].stage))
    return [patch for _, patch in ranked], untried


def _reach(patch: Patch, target: Target) -> int:
    """Number of tokens up to which ``patch`` changes nothing; 0 if length plays no part, or if it will be refused."""
    try:
        return patch.promises(target).same_up_to
    except PatchError:
        return 0
