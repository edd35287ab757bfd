"""`make release`: builds the files of a release, checks them, and says what to do next. It uploads nothing.

    python tools/release.py [--out dist] [--rehearse]

Needs what `pip install '.[release]'` brings, a C++ compiler, git and binutils. Refuses a working tree with changes, a version
that CHANGELOG.md does not begin with, and one whose tag exists; with --rehearse it names these, and goes on.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import distributions
from distributions import ROOT

VERSION = re.compile(r"^## \[?(\d+\.\d+\.\d+)\]? - (\d{4}-\d{2}-\d{2})$", flags=re.MULTILINE)
NEXT = """
Next, by hand:
  make matrix ARGS="--wheel {wheel}"       every Python and both torches; an hour
  git tag -a v{version} -m "glf_fast {version}" && git push origin v{version}
  python -m twine upload {sdist} {wheel}
"""


def git(*arguments: str) -> str:
    """The output of git."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def unprepared(version: str, changelog: str, citation: str, status: str, tags: list[str]) -> Iterator[str]:
    """Reasons why this version cannot be released from this repository.

    Args:
        version: the version of pyproject.toml.
        changelog, citation: the contents of CHANGELOG.md and CITATION.cff.
        status: the output of `git status --porcelain` for tracked files.
        tags: the tags that exist.
    """
    newest = VERSION.search(changelog)
    if not newest:
        yield "CHANGELOG.md has no heading of the form `## [1.2.3] - 2026-01-31`"
    elif re.search(r"^## \[Unreleased\]\n\s*[^\s#]", changelog, flags=re.MULTILINE):
        yield "CHANGELOG.md has entries under Unreleased; they belong to a version"
    elif newest[1] != version:
        yield f"CHANGELOG.md begins with {newest[1]}, and pyproject.toml says {version}"
    cited = re.search(r"^version: *[\"']?([\w.]+)", citation, flags=re.MULTILINE)
    if not cited or cited[1] != version:
        yield f"CITATION.cff cites {cited[1] if cited else 'no version'}, and pyproject.toml says {version}"
    dated = re.search(r"^date-released: *[\"']?([\d-]+)", citation, flags=re.MULTILINE)
    if newest and (not dated or dated[1] != newest[2]):
        yield f"CITATION.cff is dated {dated[1] if dated else 'not at all'}, and CHANGELOG.md {newest[2]}"
    if status:
        yield f"the working tree has changes that are not committed: {' '.join(status.split())}"
    if f"v{version}" in tags:
        yield f"the tag v{version} exists"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the two files (default: dist)")
    parser.add_argument("--rehearse", action="store_true", help="build also what cannot be released yet")
    options = parser.parse_args()
    version = distributions.version()
    reasons = list(
        unprepared(
            version,
            (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
            (ROOT / "CITATION.cff").read_text(encoding="utf-8"),
            git("status", "--porcelain", "--untracked-files=no"),
            git("tag").split(),
        )
    )
    for reason in reasons:
        print(f"{'rehearsing although' if options.rehearse else 'error:'} {reason}", file=sys.stderr)
    if reasons and not options.rehearse:
        sys.exit(2)
    made = distributions.build(options.out)
    wrong = list(distributions.complaints(made))
    for complaint in wrong:
        print(f"error: {complaint}", file=sys.stderr)
    if wrong:
        sys.exit(1)
    for path in made:
        print(f"{path}  {path.stat().st_size:,} bytes")
    print(NEXT.format(version=version, sdist=made.sdist, wheel=made.wheel))


if __name__ == "__main__":
    main()
