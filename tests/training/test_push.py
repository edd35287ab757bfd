"""Publishing: a run and a model go to a Hub over HTTP, and come back equal."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import hub
import pytest
import torch
import yaml

from glf_fast import push
from glf_fast.errors import UserError
from glf_fast.training import card, runs

Call = Callable[..., None]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
    """A Hub for processes that begin now: huggingface_hub reads its settings when it is imported."""
    with hub.serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield server


# A deprecation inside huggingface_hub, whose upload calls httpx in an old way.
QUIET = """
import warnings
warnings.filterwarnings("ignore", message="Use 'content=", category=DeprecationWarning)
"""


def ended(code: str) -> str:
    done = forked.fresh(QUIET + code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_is_published_and_loaded_by_its_name(served: hub.Hub, smoke: Path) -> None:
    printed = ended(f"""
import sys
sys.argv = ["push", {str(smoke)!r}, "somebody/digits", "--private"]
from glf_fast import push
push.main()
""")
    files = served.files["somebody/digits"]
    assert served.endpoint + "/somebody/digits/commit/" in printed and served.private["somebody/digits"]
    pictures = {"samples.png", "reconstructions.png", "interpolations.png"}
    assert set(files) == {"config.json", "model.safetensors", "README.md", *pictures}
    best = smoke / "checkpoints" / "best"
    assert files["model.safetensors"] == (best / "model.safetensors").read_bytes()
    assert all(files[name].startswith(b"\x89PNG") for name in pictures)
    ended(f"""
import torch
from glf_fast import GLF
model, saved = GLF.from_pretrained("somebody/digits"), GLF.from_pretrained({str(best)!r})
def draw(model): return model.sample(3, generator=torch.Generator().manual_seed(0))
assert torch.equal(draw(model), draw(saved))
""")
    assert any(request.startswith("GET /somebody/digits/resolve/") for request in served.requests)


def test_a_model_is_published_by_itself_and_again(served: hub.Hub, smoke: Path) -> None:
    ended(f"""
from glf_fast import GLF
model = GLF.from_pretrained({str(smoke / "checkpoints" / "best")!r})
model.push_to_hub("somebody/model")
model.push_to_hub("somebody/model", commit_message="again")
""")
    assert len(served.commits["somebody/model"]) >= 2
    assert {"config.json", "model.safetensors", "README.md"} <= set(served.files["somebody/model"])


@pytest.mark.parametrize(
    ("token", "said"),
    [("hf_other", "401"), (hub.TOKEN, "507"), ("", "cannot be reached")],
    ids=["stranger", "full", "no Hub"],
)
def test_a_refusal_is_told_in_a_line(
    served: hub.Hub, smoke: Path, monkeypatch: pytest.MonkeyPatch, token: str, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token or hub.TOKEN)
    if not token:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    served.full = True
    done = forked.fresh(f"""{QUIET}
import sys
sys.argv = ["push", {str(smoke)!r}, "somebody/digits"]
from glf_fast import push
from glf_fast.errors import run_command
run_command(push.main)
""")
    assert done.returncode == 2 and not any(served.files.values())
    assert re.search(rf"^error: .*{said}.*\n\Z", done.stderr, flags=re.MULTILINE), done.stderr


def test_a_name_that_the_hub_refuses_is_an_error_before_anything_is_sent(smoke: Path, call: Call) -> None:
    with pytest.raises(UserError, match=r"a/-b is no name of a model"):
        call(push, smoke, "a/-b")
    for name in ("digits", "a//b"):
        with pytest.raises(UserError, match=rf"{name} must be OWNER/NAME"):
            call(push, smoke, name)


def test_the_card_has_the_scores_with_their_protocols(smoke: Path) -> None:
    (score,) = runs.read_scores(smoke)
    images = score["checkpoint"]["images"]
    assert "This model has no scores yet." in card.text(
        smoke, images + 1, "somebody/digits", {}
    )  # of another checkpoint
    written = card.text(smoke, images, "somebody/digits", {"samples": "samples.png"})
    head, _, body = written.removeprefix("---\n").partition("\n---\n")
    about = yaml.safe_load(head)
    (result,) = about["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == score["samples"]["value"]
    assert about["library_name"] == "glf_fast" and about["tags"] == ["generative-model", "glf"]
    line = card.protocol_line(score)
    assert f"| FD[tiny] of samples | {score['samples']['value']:.2f} |" in body and line in body
    assert "180 samples, 180 images of digits:test" in line and "checkpoint best, epoch 4" in line
    assert "![samples](samples.png)" in body and "reconstructions.png" not in body
    protocols = json.loads(re.search(r"```json\n(.*?)```", body, flags=re.DOTALL)[1])
    assert protocols == [score["samples"]["protocol"]]
    assert (smoke / "config.toml").read_text(encoding="utf-8").strip() in body


def test_the_cards_example_runs(smoke: Path) -> None:
    images = 0
    code = re.search(r"```python\n(.*?)```", card.text(smoke, images, "somebody/digits", {}), flags=re.DOTALL)[1]
    names: dict[str, object] = {}
    exec(code.replace("somebody/digits", str(smoke / "checkpoints" / "best")), names)
    assert isinstance(names["samples"], torch.Tensor) and names["samples"].shape == (16, 1, 8, 8)


def test_a_run_without_scores_has_a_card(run: Path) -> None:
    (run / "scores.json").unlink()
    assert "This model has no scores yet." in card.text(run, 0, "somebody/digits", {})
