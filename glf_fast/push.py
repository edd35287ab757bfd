"""python -m glf_fast.push RUN OWNER/NAME: publish a run's model on the Hugging Face Hub, with a card, pictures and scores."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from glf_fast import distributed
from glf_fast.command_line import parse
from glf_fast.errors import UserError, run_command
from glf_fast.training import card, checkpoint, runs


@dataclass(frozen=True)
class Command:
    """Publish a run's model on the Hugging Face Hub: weights and settings, a card with the scores, pictures.

    `hf auth login` or $HF_TOKEN says who you are.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Name of the model on the Hub, which is created if need be."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint of the run to publish."""
    private: bool = False
    """Create a model that only its owner sees; one that exists stays as it is."""


def main() -> None:
    """Run the command."""
    distributed.refuse_several()
    command = parse(Command, sys.argv[1:], "glf_fast.push")
    if command.repository.count("/") != 1:
        raise UserError(f"{command.repository} must be OWNER/NAME, the name of a model on the Hub with its owner")
    which = runs.pick_checkpoint(command.run, command.checkpoint)
    model, state = checkpoint.load_model(runs.checkpoint_folder(command.run, which), torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="glf_fast-push-") as temporary:
        folder = Path(temporary)
        names = {}
        for kind, path in card.pictures(command.run).items():
            names[kind] = f"{kind}.png"
            shutil.copyfile(path, folder / names[kind])
        # First: save_pretrained keeps a card that is there.
        (folder / "README.md").write_text(
            card.text(command.run, state["images"], command.repository, names), encoding="utf-8"
        )
        model.save_pretrained(folder)
        hub = HfApi(library_name="glf_fast")
        try:
            hub.create_repo(command.repository, private=command.private, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=command.repository, folder_path=folder, commit_message="Model of glf_fast"
            )
        except HFValidationError as error:
            raise UserError(f"{command.repository} is no name of a model on the Hub ({error})") from error
        except RuntimeError as error:  # huggingface_hub's, around an error of the network
            raise UserError(f"{error} ({error.__cause__})") from error
        except Exception as error:
            # Those of huggingface_hub's HTTP client (requests, then httpx, then httpx2) have no class in common.
            if type(error).__module__.partition(".")[0] not in ("requests", "httpx", "httpx2"):
                raise
            raise UserError(f"the Hub at {hub.endpoint} cannot be reached ({error})") from error
    print(commit.commit_url)


if __name__ == "__main__":
    run_command(main)
