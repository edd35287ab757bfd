"""A release: what its files hold, what stops it, and that the documents agree with the code."""

import re
import subprocess
import zipfile
from pathlib import Path

import distributions
import forked
import pytest
import release

from glf_fast.reference import ACTIVATIONS, LOG_SCALES, Spline
from glf_fast.reference.spline import PARAMETRIZATIONS
from glf_fast.training import checkpoint

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
BUILD = "from setuptools import build_meta; build_meta.build_sdist({folder!r}); build_meta.build_wheel({folder!r})"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files, built from the tracked files where no compiler works."""
    folder = tmp_path_factory.mktemp("release")
    sources = folder / "sources"
    for name in distributions.tracked():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_bytes((ROOT / name).read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sources)
        patch.setenv("CC", "false")
        patch.setenv("CXX", "false")
        done = forked.ended(forked.program, BUILD.format(folder=str(folder)))
    assert done.returncode == 0, done.stderr
    return folder


def test_the_files_hold_what_git_tracks_and_no_more(built: Path) -> None:
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    found = list(distributions.complaints(distributions.Distributions(sdist, wheel)))
    # Of a wheel without a library nothing else is wrong. PyPI's own checks are those of `make release`.
    found = [line for line in found if not line.startswith(("twine", "check_wheel_contents"))]
    assert len(found) == 2, found
    assert "says nothing of the glibc" in found[0]
    assert found[1] == f"{wheel.name} lacks {distributions.LIBRARY}"


def test_junk_is_named(built: Path, tmp_path: Path) -> None:
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    spoilt = tmp_path / wheel.name
    spoilt.write_bytes(wheel.read_bytes())
    with zipfile.ZipFile(spoilt, "a") as archive:
        archive.writestr("glf_fast/__pycache__/info.cpython-311.pyc", b"")
    found = " ".join(distributions.complaints(distributions.Distributions(sdist, spoilt)))
    assert "has glf_fast/__pycache__/info.cpython-311.pyc, which git does not track" in found


def test_wide_instructions_are_found_where_nothing_checks_for_them(tmp_path: Path) -> None:
    source, library = tmp_path / "sums.cpp", tmp_path / "sums.so"
    source.write_text(
        """
#define SUM(name) extern "C" __attribute__((target("avx2"))) void name(float* x, const float* y) \\
    { for (int i = 0; i < 64; ++i) x[i] += y[i]; }
SUM(sum_always)
namespace avx2 { SUM(sum_avx2) }
extern "C" void sum_plain(float* x, const float* y) { for (int i = 0; i < 64; ++i) x[i] += y[i]; }
""",
        encoding="utf-8",
    )
    subprocess.run(["c++", "-O3", "-shared", "-fPIC", source, "-o", library], check=True)
    assert distributions.not_baseline(library) == {"sum_always"}


READY = (
    "1.2.3",
    "# Changelog\n\n## [1.2.3] - 2026-01-31\n",
    "version: 1.2.3\ndate-released: 2026-01-31\n",
    "",
    ["v1.2.2"],
)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, "1.2.4", r"CHANGELOG.md begins with 1\.2\.3, and pyproject\.toml says 1\.2\.4"),
        (1, "# Changelog\n\n## [Unreleased]\n", "has no heading of the form"),
        (1, "# Changelog\n\n## [Unreleased]\n\n* More.\n\n## [1.2.3] - 2026-01-31\n", "entries under Unreleased"),
        (2, "version: 1.2.3\ndate-released: 2026-01-30\n", "is dated 2026-01-30, and CHANGELOG.md 2026-01-31"),
        (2, "version: 1.2.2\n", r"CITATION\.cff cites 1\.2\.2"),
        (2, "title: glf_fast\n", "cites no version"),
        (3, " M setup.py", "changes that are not committed: M setup.py"),
        (4, ["v1.2.3"], "the tag v1.2.3 exists"),
    ],
)
def test_what_stops_a_release(place: int, value: object, said: str) -> None:
    assert list(release.unprepared(*READY)) == []
    given = [*READY[:place], value, *READY[place + 1 :]]
    assert any(re.search(said, reason) for reason in release.unprepared(*given))


def test_the_documents_are_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = re.sub(r"^## \[Unreleased\].*?(?=^## )", "", CHANGELOG, flags=re.MULTILINE | re.DOTALL)
    assert list(release.unprepared(distributions.version(), released, citation, "", [])) == []


def test_the_changelogs_constants_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| `", CHANGELOG, flags=re.MULTILINE))
    assert re.findall(r"`(\w+)`", rows["formulas of the log-scales, by name"]) == list(LOG_SCALES)
    constants = ["none" if value is None else str(value) for value in LOG_SCALES.values()]
    assert rows["their constants, where a config gives none"] == ", ".join(constants)
    assert re.findall(r"`(\w+)`", rows["formulas of the activations, by name"]) == list(ACTIVATIONS)
    found = rows["the constants of `leaky_relu` and `elu`, where a config gives none"]
    assert found == ", ".join(str(value) for value in ACTIVATIONS.values() if value is not None)
    spline = Spline()
    assert rows["a spline, where a config gives nothing else"] == (
        f"{spline.bins} bins in the box −{-spline.low:g} … {spline.high:g}, tails `{spline.tails}`, "
        f"parametrization `{spline.parametrization}`"
    )
    least = {name: form[2:] for name, form in PARAMETRIZATIONS.items()}
    assert least == {"madnis": (0.001,) * 3, "nflows": (0.001,) * 3, "zuko": (0.0, 0.0, 0.001)}
    assert rows["format of a checkpoint"] == f"{checkpoint._FORMAT}; 1 is read" and checkpoint._READABLE == (1, 2)
