"""python -m glf_fast.explore RUN [RUN …]: a page in the browser over trained models of images."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from glf_fast import distributed
from glf_fast.command_line import parse, pick_device
from glf_fast.data.attributes import attribute_names
from glf_fast.errors import UserError, run_command


@dataclass(frozen=True)
class Command:
    """Look at trained models of images in the browser: samples, latent space, edits, reconstructions. Ctrl-C ends it."""

    run: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]")]
    """Folders of the runs, which are shown side by side. Test images are those of the first one."""
    port: int = 8008
    """Port of this machine at which the page is; 0 for any free one. Other machines cannot reach it."""
    attributes: Path | None = None
    """File with attributes of the training images to edit by: CelebA's list_attr_celeba.txt, or a CSV with a column of the
    images' file names, or of their places from 0, and a column of 1 and 0 for each attribute."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint of the runs to use."""
    data_dir: Path | None = None
    """Folder in which to look for the data sets first."""
    device: str = ""
    """Device: cpu, cuda, cuda:1, …; by default cuda if there is a GPU."""


def main() -> None:
    """Run the command."""
    distributed.refuse_several()
    command = parse(Command, sys.argv[1:], "glf_fast.explore")
    if not command.run:
        raise UserError("give the folder of a run; python -m glf_fast.train creates such folders")
    try:
        from glf_fast.exploring import loading, server
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UserError(
            f"{error.name}, which the page needs, is not installed; install it with pip install 'glf_fast[explore]'"
        ) from error
    device = pick_device(command.device)
    names = attribute_names(command.attributes) if command.attributes else ()
    with server.listen(command.port) as listening:  # first: a port that is taken costs no loading
        opened = [
            loading.open_run(
                folder,
                device,
                which=command.checkpoint,
                data_dir=command.data_dir,
                attributes=command.attributes,
                names=names,
            )
            for folder in command.run
        ]
        print(f"exploring at http://{server.HOST}:{listening.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
        server.serve(opened, listening)
    print("stopped")


if __name__ == "__main__":
    run_command(main)
