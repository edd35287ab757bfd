"""A local server that answers requests well, badly, or not at all."""

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        if name.startswith("moved/"):
            self.send_response(302)
            self.send_header("Location", f"/{name.removeprefix('moved/')}")
            self.end_headers()
        elif name.startswith("cut/"):
            content = (Path(self.directory) / name.removeprefix("cut/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address, folder) of a server of the folder's files; /moved/NAME redirects, /cut/NAME breaks off half way."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An empty cache for each test, unless the test uses the real files."""
    if not {"fashion_mnist_dir", "vgg16_weights"} & set(request.fixturenames):
        monkeypatch.setenv("GLF_FAST_CACHE", str(tmp_path / "cache"))
