"""Lays the pages of the site out as they lie in the repository; a hook of mkdocs.

GitHub shows the pages where they are, so their links are relative to that. On the site README.md is the home page, and
a link to a file that is not a page (a recipe, a licence, a table of measurements) leads to the file on GitHub.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "recipes/README.md")
# Tables of measurements are wide.
WIDE = ".md-grid { max-width: 76rem; }\n"
# Code is left as it is: a fenced block, or text in backticks.
CODE_OR_LINK = re.compile(r"^```.*?^```|`[^`\n]+`|\]\(([^)\s]+)\)", re.DOTALL | re.MULTILINE)


def on_config(config: Any) -> Any:
    """Give headings the anchors that GitHub gives them."""
    from pymdownx.slugs import slugify

    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Put the pages of `docs_dir` under `docs/`, and those outside of it beside."""
    from mkdocs.structure.files import File, Files

    documents = Path(config.docs_dir).resolve()
    names = [f"docs/{file.src_uri}" for file in files if file.src_dir and Path(file.src_dir).resolve() == documents]
    from_theme = [file for file in files if not file.src_dir or Path(file.src_dir).resolve() != documents]
    ours = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in (*PAGES, *names)]
    style = File.generated(config, "wide.css", content=WIDE)
    return Files([*from_theme, *ours, style])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links to files that the site does not have lead to GitHub."""
    return to_repository(markdown, page.file.src_uri, {file.src_uri for file in files}, config.repo_url)


def to_repository(markdown: str, page: str, on_site: set[str], repository: str) -> str:
    """Rewrite the relative links of a page that lead to a file of the repository and not to one of the site.

    Args:
        markdown: The page's text.
        page: Its path from the root of the repository.
        on_site: Paths of all files of the site.
        repository: Where the repository is shown.
    """

    def rewrite(found: re.Match[str]) -> str:
        link = found[1]
        if link is None or re.match(r"[a-z]+:|#", link):
            return found[0]
        name, _, anchor = link.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), name))
        # What exists nowhere stays as it is, and the strict build names it.
        if path in on_site or not (ROOT / path).exists():
            return found[0]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({repository}/{kind}/main/{path}{'#' + anchor if anchor else ''})"

    return CODE_OR_LINK.sub(rewrite, markdown)
