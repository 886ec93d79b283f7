"""Checks that a tag may be released; exit code 1 if there is a finding.

`python .ci/check_release.py TAG [DIST]`. The tag, the version of the package, the newest section of CHANGELOG.md and
CITATION.cff must agree, and nothing may be left that a release fills in: a date, the account that publishes. In a
folder DIST there must be one wheel and one sdist of this version, whose description has no link that only a clone
resolves. It reads files only, and needs nothing but Python.
"""

from __future__ import annotations

import email.parser
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A link or a picture, in Markdown or in HTML.
LINK = re.compile(r"\]\(([^)\s]+)|\b(?:src|srcset|href)=\"([^\"]+)")


def stated(path: Path, pattern: str) -> str:
    """The first group of the first match in a file; empty without one."""
    found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def findings_of_sources(tag: str, root: Path) -> Iterator[str]:
    """Yield the reasons in the repository not to release a tag."""
    version = stated(root / "dapa_merge" / "__init__.py", r'^__version__ = "(.+)"')
    if tag != f"v{version}":
        yield f"the tag is {tag!r}, but dapa_merge/__init__.py has version {version!r}"
    if (newest := stated(root / "CHANGELOG.md", r"^## \[(.+?)\]")) != version:
        yield f"the newest section of CHANGELOG.md is {newest!r}, not {version!r}"
    when = stated(root / "CHANGELOG.md", r"^## \[.+?\] - (.+)$")
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", when):
        yield f"the newest section of CHANGELOG.md says {when!r} where its date belongs"
    if (cited := stated(root / "CITATION.cff", r"^version: (.+)$")) != version:
        yield f"CITATION.cff has version {cited!r}, not {version!r}"
    for name in ("pyproject.toml", "CITATION.cff", ".ci/mkdocs.yml"):
        if re.search(r"\bOWNER[/.]", (root / name).read_text(encoding="utf-8")):
            yield f"{name} still has the placeholder OWNER in an address; write the account that publishes"


def metadata_of(path: Path) -> str:
    """The metadata of a wheel or an sdist."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            return wheel.read(name).decode()
    with tarfile.open(path) as sdist:
        (name,) = (name for name in sdist.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", name))
        file = sdist.extractfile(name)
        assert file is not None
        return file.read().decode()


def findings_of_builds(tag: str, folder: Path) -> Iterator[str]:
    """Yield the reasons in a folder of builds not to release a tag."""
    paths = sorted(folder.iterdir())
    if sorted(path.name.rpartition(".")[2] for path in paths) != ["gz", "whl"]:
        yield f"{folder} must hold one wheel and one sdist, and has {[path.name for path in paths]}"
        return
    for path in paths:
        metadata = email.parser.Parser().parsestr(metadata_of(path))
        if f"v{metadata['Version']}" != tag:
            yield f"{path.name} has version {metadata['Version']}, and the tag is {tag}"
        links = ["".join(found) for found in LINK.findall(str(metadata.get_payload()))]
        if not links:
            yield f"{path.name} has a description without a link, so it is not the README"
        if relative := [link for link in links if not re.match(r"[a-z]+:|#", link)]:
            yield f"{path.name} has links that an index cannot follow: {', '.join(relative)}"


def main() -> None:
    """Print the findings."""
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    tag = sys.argv[1]
    found = list(findings_of_sources(tag, ROOT))
    if len(sys.argv) == 3:
        found += findings_of_builds(tag, Path(sys.argv[2]))
    for line in found:
        print(line)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
