"""What `make docs` adds to the pages of docs/: the README as the first page, and a page of the API for every public name.

Links into the rest of the repository become plain paths, after a look whether they lead anywhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # The README stands one folder above the pages.
    moved = {"](docs/": "](", **{f"]({folder}": f"](../{folder}" for folder in ("patchkit/", "examples/", "CONTRIBUTING.md")}}
    for inside, outside in moved.items():
        readme = readme.replace(inside, outside)
    files.append(File.generated(config, "index.md", content=readme))
    names = public_names()
    for name, place in names.items():
        files.append(File.generated(config, f"api/{name}.md", content=f"# {name}\n\n::: {place}\n"))
    listed = "\n".join(f"* [`{name}`]({name}.md)" for name in names)
    files.append(File.generated(config, "api/index.md", content=f"# API\n\nWhat `from patchkit import ...` gives.\n\n{listed}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
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


def public_names() -> dict[str, str]:
    """Every public name of patchkit, with the module that defines it."""
    import patchkit
    from patchkit.patch import available_patches

    found = {name: f"patchkit.{home}.{name}" for name, home in patchkit._HOME_OF.items()}
    found |= {cls.__name__: f"{cls.__module__}.{cls.__name__}" for cls in available_patches().values()}
    return dict(sorted(found.items()))
