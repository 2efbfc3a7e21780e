"""Pages that `make docs` adds to those of docs/: the README as the first page, and one page of the API for every public name.

Links into the rest of the repository become plain paths, after a check that the path exists.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
# Modules whose names users import, apart from patchkit itself.
OPEN_MODULES = ("rl", "serving", "speculation", "testing")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    from mkdocs.structure.files import File

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # The README is one folder above the pages.
    moved = {"](docs/": "](", **{f"]({folder}": f"](../{folder}" for folder in ("patchkit/", "examples/", "CONTRIBUTING.md")}}
    for inside, outside in moved.items():
        readme = readme.replace(inside, outside)
    files.append(File.generated(config, "index.md", content=readme))
    index = "# API\n"
    for module, names in public_names().items():
        folder = module.removeprefix("patchkit").replace(".", "")
        index += f"\n## from {module} import ...\n\n"
        for name, place in names.items():
            page = f"{folder}/{name}.md" if folder else f"{name}.md"
            files.append(File.generated(config, f"api/{page}", content=f"# {name}\n\n::: {place}\n"))
            index += f"* [`{name}`]({page})\n"
    files.append(File.generated(config, "api/index.md", content=index))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    from mkdocs.exceptions import PluginError

    def path_of(match: re.Match[str]) -> str:
        picture, text, target, _ = match.groups()
        if "://" in target or not target.startswith("../") or page.file.src_uri.startswith("api/"):
            return match.group(0)
        place = (ROOT / "docs" / target).resolve()
        if not place.exists():
            raise PluginError(f"{page.file.src_uri}: the link to {target} leads nowhere")
        relative = place.relative_to(ROOT)
        return f"`{relative}`" if picture or text.strip("`") in (str(relative), place.name) else f"{text} (`{relative}`)"

    return _LINK.sub(path_of, markdown)


def public_names() -> dict[str, dict[str, str]]:
    """Every public name, as {module: {name: path of its definition}}: those of patchkit, and of `OPEN_MODULES`."""
    import patchkit
    from patchkit.patch import available_patches

    found = {name: f"patchkit.{home}.{name}" for name, home in patchkit._HOME_OF.items()}
    found |= {cls.__name__: f"{cls.__module__}.{cls.__name__}" for cls in available_patches().values()}
    return {"patchkit": dict(sorted(found.items()))} | {f"patchkit.{each}": _names_of(f"patchkit.{each}") for each in OPEN_MODULES}


def _names_of(name: str) -> dict[str, str]:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None) or [
        each for each, value in vars(module).items() if not each.startswith("_") and not inspect.ismodule(value)
    ]
    return {each: f"{name}.{each}" for each in sorted(public)}
