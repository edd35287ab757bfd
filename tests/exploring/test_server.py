"""The server of the page, asked over HTTP: what it answers, what it refuses, and that it writes nothing."""

import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from served_pages import served

from glf_fast.errors import UserError
from glf_fast.exploring.loading import Opened, open_run
from glf_fast.exploring.server import listen
from glf_fast.exploring.uploads import MOST_BYTES

BYTES = "application/octet-stream"
SAMPLE = {"count": 4, "temperature": 1.0, "seed": 0}


def request(
    port: int, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


def post(port: int, path: str, arguments: object) -> tuple[int, dict[str, object]]:
    body = json.dumps(arguments).encode()
    status, _, content = request(port, "POST", path, body, content_type="application/json")
    return status, json.loads(content)


@pytest.fixture(scope="module")
def port(opened: Callable[..., Opened]) -> Iterator[int]:
    with served(opened("glf"), opened("dcgan")) as port:
        yield port


def test_the_page_and_its_runs(port: int) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, content = request(port, "GET", path)
        assert status == 200 and headers["content-type"].startswith(kind) and content
        assert "default-src 'none'" in headers["content-security-policy"] and headers["cache-control"] == "no-store"
    status, _, content = request(port, "GET", "/about")
    about = json.loads(content)
    assert [run["name"] for run in about["runs"]] == ["glf", "dcgan"] and about["tests"] == 40
    assert about["runs"][0]["attributes"] == [f"label {i}" for i in range(10)] and about["runs"][0]["encodes"]
    assert about["runs"][1]["attributes"] == [] and not about["runs"][1]["encodes"]
    status, headers, content = request(port, "GET", "/test/39")
    assert status == 200 and headers["content-type"] == "image/png" and Image.open(io.BytesIO(content)).size == (96, 96)


def test_an_answer_has_a_picture_and_its_time(port: int, digits: tuple[object, ...]) -> None:
    status, answer = post(port, "/runs/0/sample", SAMPLE)
    assert status == 200 and answer["columns"] == 2 and answer["count"] == 4 and answer["ms"] > 0
    assert Image.open(io.BytesIO(base64.b64decode(answer["picture"]))).size == (192, 192)


def test_uploads_come_back_as_each_run_takes_them(port: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    status, _, content = request(port, "POST", "/upload", file.getvalue(), content_type=BYTES)
    images = json.loads(content)["images"]
    assert status == 200 and len(images) == 2
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(images[0])))) == pixels).all()
    assert post(port, "/runs/0/reconstruct", {"image": {"png": images[0]}})[0] == 200
    status, _, content = request(port, "POST", "/upload", b"words", content_type=BYTES)
    assert status == 400 and "not a picture" in json.loads(content)["error"]
    status, _, content = request(port, "POST", "/upload", bytes(MOST_BYTES + 1), content_type=BYTES)
    assert status == 413 and "more than 20 MB" in json.loads(content)["error"]


@pytest.mark.parametrize(
    ("path", "arguments", "status", "message"),
    [
        ("/runs/0/sample", SAMPLE | {"count": 65}, 400, "count must be a whole number between 1 and 64; got 65"),
        ("/runs/0/sample", SAMPLE | {"count": True}, 400, "count must be a whole number"),
        ("/runs/0/sample", SAMPLE | {"temperature": "hot"}, 400, "temperature must be a number between 0 and 2"),
        ("/runs/0/sample", SAMPLE | {"temperature": float("nan")}, 400, "temperature must be a number"),
        ("/runs/0/sample", SAMPLE | {"seed": -1}, 400, "seed must be a whole number"),
        ("/runs/0/sample", [1], 400, "the arguments are not an object"),
        ("/runs/0/nearest", SAMPLE | {"place": 4}, 400, "place must be a whole number between 0 and 3"),
        ("/runs/0/reconstruct", {"image": {"test": 40}}, 400, "image must be a test image between 0 and 39; got 40"),
        ("/runs/0/reconstruct", {"image": {"png": "%%%"}}, 400, "image is not the PNG file of an image"),
        ("/runs/0/reconstruct", {"image": {"png": "d29yZHM="}}, 400, "not a picture that can be read"),
        ("/runs/0/walk", {"origin": "mean", "axes": ["up"], "at": [0, 0]}, 400, "axes must have two entries"),
        ("/runs/0/walk", {"origin": "mean", "axes": ["up", "down"], "at": [0, 9]}, 400, "at must be a number between -3 and 3"),
        ("/runs/0/walk", {"origin": "mean", "axes": ["up", "down"], "at": [0, 1]}, 400, "there is no direction 'up'"),
        ("/runs/0/edit", {"image": {"test": 0}, "amounts": 3}, 400, "amounts must have a number for each attribute"),
        ("/runs/0/edit", {"image": {"test": 0}, "amounts": {"x\ud800": 1}}, 400, "names of attributes must be printable"),
        ("/runs/1/edit", {"image": {"test": 0}, "amounts": {}}, 400, "DCGAN has no encoder"),
        ("/runs/2/sample", SAMPLE, 404, "there is no /runs/2/sample"),
        ("/runs/0/train", {}, 404, "there is no /runs/0/train"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_in_words(
    path: str, arguments: object, status: int, message: str, port: int
) -> None:
    got, answer = post(port, path, arguments)
    assert got == status and message in str(answer["error"])


def test_nobody_else_is_answered(port: int) -> None:
    assert request(port, "GET", "/about", host="rebound.example")[0] == 400
    assert request(port, "GET", "/about", host=f"localhost:{port}")[0] == 200
    body = json.dumps(SAMPLE).encode()
    for path in ("/runs/0/sample", "/upload"):
        assert request(port, "POST", path, body, content_type="text/plain")[0] == 415
    for wrong in (b"{", b"\xff", b"[" * 100_000):
        assert request(port, "POST", "/runs/0/sample", wrong, content_type="application/json")[0] == 400
    for path in (
        "/server.py",
        "/..%2fserver.py",
        "/%2e%2e/loading.py",
        "/docs",
        "/openapi.json",
        "/test/40",
        "/test/-1",
        "/test/" + "9" * 5000,
    ):
        assert request(port, "GET", path)[0] == 404, path
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.2", port), 5):
        pass


def test_test_images_are_made_to_fit_a_run_of_another_size(smoke: Path, coloured: Path) -> None:
    before = {path: path.stat().st_mtime_ns for run in (smoke, coloured) for path in run.rglob("*")}
    with served(open_run(coloured, torch.device("cpu")), open_run(smoke, torch.device("cpu"))) as port:
        for run, size in ((0, 96), (1, 96)):
            status, answer = post(port, f"/runs/{run}/reconstruct", {"image": {"test": 3}})
            assert status == 200
            picture = Image.open(io.BytesIO(base64.b64decode(answer["picture"])))
            assert picture.size == (3 * size, size) and picture.mode == ("L" if run else "RGB")
        for action in ("sample", "nearest"):
            assert post(port, f"/runs/1/{action}", SAMPLE | {"place": 0})[0] == 200
    assert before == {path: path.stat().st_mtime_ns for run in (smoke, coloured) for path in run.rglob("*")}


def test_nobody_waits_for_an_answer_at_the_end(opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    run, begun, end = opened("glf"), threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> object:
        begun.set()
        return end.wait(60)

    monkeypatch.setattr(run.model, "sample", slow)
    with served(run) as port:
        body = json.dumps(SAMPLE).encode()
        asking = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        asking.request("POST", "/runs/0/sample", body, {"content-type": "application/json"})
        assert begun.wait(30)
        start = time.monotonic()
    assert time.monotonic() - start < 20
    asking.close()
    end.set()


def test_a_bug_is_told_without_its_traceback(opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened("glf")
    monkeypatch.setattr(run.model, "sample", lambda *_, **__: 1 / 0)
    with served(run) as port:
        status, answer = post(port, "/runs/0/sample", SAMPLE)
    assert status == 500 and answer == {
        "error": "the explorer has failed at this; its terminal says where (ZeroDivisionError)"
    }


def test_ports() -> None:
    with listen(0) as taken:
        assert taken.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UserError, match=r"cannot be used .*in use.*; choose another one, or 0 for any free one"):
            listen(taken.getsockname()[1])
    with pytest.raises(UserError, match="--port 70000 does not exist"):
        listen(70000)
