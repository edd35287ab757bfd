"""What travels to a GPU machine: packed, unpacked elsewhere, refused where it does not fit, and never outside its folders."""

import io
import json
import sys
import tarfile
from pathlib import Path

import carry
import forked
import pytest
from carry import Manifest

ROOT = Path(__file__).parents[2]

HERE = Manifest(triton="a" * 64, torch="2.11.0+cu130", python="3.12", machine="x86_64", sources="b" * 64)


def kernel(cache: Path, folder: str, name: str) -> None:
    """As Triton's FileCacheManager leaves one."""
    (cache / folder).mkdir(parents=True)
    for suffix, content in (("cubin", b"\x7fELF" + folder.encode()), ("ptx", b"text"), ("ttir", b"text")):
        (cache / folder / f"{name}.{suffix}").write_bytes(content)
    (cache / folder / f"{name}.json").write_text(json.dumps({"name": name, "num_warps": 4}))
    paths = {
        f"{name}.{suffix}": str(cache / folder / f"{name}.{suffix}") for suffix in ("cubin", "ptx", "ttir", "json")
    }
    (cache / folder / f"__grp__{name}.json").write_text(json.dumps({"child_paths": paths}))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    cache = tmp_path / "here" / "triton"
    kernel(cache, "ONE", "flow_kernel")
    kernel(cache, "TWO", "flow_backward_kernel")
    kernel(cache, "THREE", "triton_poi_fused_add_0")  # torch.compile's
    (cache / "LAUNCHER").mkdir()
    (cache / "LAUNCHER" / "__triton_launcher.so").write_bytes(b"\x7fELF")
    library, wheel = tmp_path / "here" / "_cuda.abi3.so", tmp_path / "here" / "tyro-1-py3-none-any.whl"
    library.write_bytes(b"\x7fELF library")
    wheel.write_bytes(b"PK")
    names = frozenset({"flow_kernel", "flow_backward_kernel"})
    assert carry.pack(tmp_path / "carry.tar.xz", [library], [wheel], cache, names, HERE) == 2
    return tmp_path / "carry.tar.xz"


def unpack(archive: Path, present: Manifest = HERE) -> tuple[str, Path, Path]:
    root, cache = archive.parent / "there" / "repository", archive.parent / "there" / "cache"
    (root / "glf_fast").mkdir(parents=True, exist_ok=True)
    return "; ".join(carry.unpack(archive, root, cache, present)), root, cache


def test_kernels_and_libraries_arrive_whole(packed: Path) -> None:
    told, root, cache = unpack(packed)
    assert told == "1 libraries taken; 1 wheels taken; 2 kernels taken"
    assert (root / "glf_fast" / "_cuda.abi3.so").read_bytes() == b"\x7fELF library"
    assert [path.name for path in (root / "wheels").iterdir()] == ["tyro-1-py3-none-any.whl"]
    found = {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}
    files = {f"{f}/{p}{n}.{s}" for f, n in (("ONE", "flow_kernel"), ("TWO", "flow_backward_kernel"))
             for p, s in (("", "cubin"), ("", "json"), ("__grp__", "json"))}  # fmt: skip
    assert found == files | {"LAUNCHER/__triton_launcher.so"}
    # Triton looks for a kernel's files under the paths of its group, and compiles again where they do not exist.
    group = json.loads((cache / "ONE" / "__grp__flow_kernel.json").read_text())["child_paths"]
    assert Path(group["flow_kernel.cubin"]).read_bytes() == b"\x7fELFONE"
    assert not [path for path in cache.parent.iterdir() if path not in (root, cache)], "temporary files are left"


def test_what_is_there_already_stays(packed: Path) -> None:
    _, _, cache = unpack(packed)
    (cache / "ONE" / "flow_kernel.cubin").write_bytes(b"compiled there")
    assert unpack(packed)[0].endswith("0 kernels taken, 2 were there already")
    assert (cache / "ONE" / "flow_kernel.cubin").read_bytes() == b"compiled there"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"triton": "c" * 64},
            f"no kernels taken, so all are compiled: Triton's key is {'c' * 64}, and the archive's aaaa",
        ),
        ({"python": "3.13"}, "no kernels taken, so all are compiled: python is 3.13, and the archive's 3.12"),
        ({"sources": "d" * 64}, "no libraries taken: csrc/ has changed"),
        ({"machine": "aarch64"}, "no libraries taken: they are for x86_64"),
        (
            {"torch": "2.12.0"},
            "1 libraries taken; 1 wheels taken; 2 kernels taken",
        ),  # a stable ABI; Triton says the rest
    ],
)
def test_what_does_not_fit_is_said_and_left(packed: Path, other: dict[str, str], said: str) -> None:
    told, root, cache = unpack(packed, HERE._replace(**other))
    assert said in told
    assert any(cache.iterdir()) == ("no kernels" not in told)
    assert any((root / "glf_fast").iterdir()) == ("no libraries" not in told)


@pytest.mark.parametrize("name", ["../outside", "cache/../../outside"])
def test_nothing_is_written_outside(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "carry.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for member, content in ((carry.MANIFEST, json.dumps(HERE._asdict()).encode()), (name, b"evil")):
            about = tarfile.TarInfo(member)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(archive)
    assert not list(tmp_path.rglob("outside"))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    archive = tmp_path / "carry.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        content = json.dumps(HERE._asdict()).encode()
        about = tarfile.TarInfo(carry.MANIFEST)
        about.size = len(content)
        tar.addfile(about, io.BytesIO(content))
        link = tarfile.TarInfo("libraries")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
    with pytest.raises(tarfile.TarError):
        unpack(archive)


def test_a_broken_archive_costs_nothing_but_its_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, as on a GPU machine: the plan goes on and compiles."""
    archive = tmp_path / "carry.tar.xz"
    archive.write_bytes(b"\xfd7zXZ not whole")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    done = forked.ended(forked.script, ROOT / "tools" / "gpu_here.py", "unpack", str(archive))
    assert done.returncode == 2 and done.stdout.startswith(f"{archive} is not used: "), done.stderr


def test_this_machine_is_described() -> None:
    about = carry.here()
    assert len(about.triton) == len(about.sources) == 64 and about.python == f"3.{sys.version_info.minor}"
