"""Writes the Triton kernels as a package for the Hugging Face Hub, in the layout of kernel-builder.

    python tools/export_kernels.py FOLDER --repository OWNER/glf-fast-kernels

FOLDER then has build.toml, CARD.md, tests/ and torch-ext/glf_fast_kernels/, which imports torch and triton alone and finds its
own modules by relative imports, so that it works under any name. Publishing needs an account and Nix:
`kernel-builder build-and-upload`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).with_name("kernel_package")
PACKAGE = "glf_fast_kernels"
# Folders of this repository that become subpackages.
PARTS = {"kernels": ROOT / "kernels", "reference": ROOT / "glf_fast" / "reference"}
IMPORT = re.compile(r"^( *from )glf_fast\.(\w+)((?:\.\w+)*)( import )", flags=re.MULTILINE)
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def relative(source: str, part: str) -> str:
    """A module's text with imports of its own subpackage made relative.

    Raises:
        ValueError: it imports another part of glf_fast, which the package does not have.
    """

    def made(found: re.Match[str]) -> str:
        start, named, rest, end = found.groups()
        if named not in PARTS:
            raise ValueError(f"{found[0].strip()} …: the package has no glf_fast.{named}")
        return f"{start}{rest or '.'}{end}" if named == part else f"{start}..{named}{rest}{end}"

    text = IMPORT.sub(made, source)
    if left := re.search(r"^ *(import|from) glf_fast\b.*$", text, flags=re.MULTILINE):
        raise ValueError(f"{left[0].strip()}: an import that is not made relative")
    return text


def export(folder: Path, repository: str) -> None:
    """Write the package to a folder, which must be new or empty.

    Raises:
        FileExistsError: it has files. ValueError: a repository that is not "owner/name".
    """
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"the repository must be OWNER/NAME; got {repository!r}")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    package = folder / "torch-ext" / PACKAGE
    for part, source in PARTS.items():
        (package / part).mkdir(parents=True)
        for path in sorted(source.glob("*.py")):
            (package / part / path.name).write_text(relative(path.read_text(encoding="utf-8"), part), encoding="utf-8")
    shutil.copy(ROOT / "kernels" / "launch_table.json", package / "kernels")
    shutil.copy(TEMPLATE / "__init__.py", package)
    shutil.copy(ROOT / "LICENSE", folder)
    shutil.copytree(TEMPLATE / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("build.toml", "CARD.md"):
        text = (TEMPLATE / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("OWNER/glf-fast-kernels", repository), encoding="utf-8")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repository", required=True, help="owner/name on the Hub")
    options = parser.parse_args()
    try:
        export(options.folder, options.repository)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.folder}: {sum(path.is_file() for path in options.folder.rglob('*'))} files")


if __name__ == "__main__":
    main()
