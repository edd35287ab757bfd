"""The Hugging Face Hub as far as uploading and downloading a model needs it: a real HTTP server on this machine.

It answers the requests that huggingface_hub makes, checks hashes and tokens as the Hub does, and keeps files in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

__all__ = ["TOKEN", "Hub", "serving"]

TOKEN = "hf_test"
LARGE = 1000  # bytes from which on a file goes through large file storage, as everything binary does on the Hub


@dataclass
class Hub:
    """Contents of the server: repositories, objects of large file storage, and the requests it has had."""

    endpoint: str = ""
    private: dict[str, bool] = field(default_factory=dict)  # by repository
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, list[str]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    requests: list[str] = field(default_factory=list)
    full: bool = False  # refuses objects

    def revision(self, repository: str) -> str:
        """The repository's newest commit, 40 hexadecimal digits."""
        return self.commits[repository][-1]


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub at `endpoint`, as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch("GET")

    def do_HEAD(self) -> None:
        self._dispatch("HEAD")

    def do_POST(self) -> None:
        self._dispatch("POST")

    def do_PUT(self) -> None:
        self._dispatch("PUT")

    def _dispatch(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{method} {path}")
        for name, pattern in _ROUTES.items():
            if found := re.fullmatch(pattern, f"{method} {path}"):
                if name.startswith("write") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self._json({"error": "Invalid username or password."}, 401)
                return getattr(self, f"_{name}")(body, *found.groups())
        return self._json({"error": f"no route for {method} {path}"}, 404)

    # -- writing -----------------------------------------------------------------------------------------------------------

    def _write_repository(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        if name in self.hub.files:
            return self._json(
                {"url": f"{self.hub.endpoint}/{name}", "error": "You already created this model repo"}, 409
            )
        self.hub.files[name], self.hub.commits[name] = {}, [hashlib.sha1(name.encode()).hexdigest()]
        self.hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
        return self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def _write_preupload(self, body: bytes, repository: str) -> None:
        if repository not in self.hub.files:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > LARGE and not file["path"].endswith(".md") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self._json({"files": files})

    def _write_batch(self, body: bytes, repository: str) -> None:
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{one['oid']}", "header": {}}},
            }
            for one in json.loads(body)["objects"]
        ]
        return self._json({"transfer": "basic", "objects": objects})

    def _object(self, body: bytes, oid: str) -> None:
        if self.hub.full:
            return self._json({"error": "Insufficient storage"}, 507)
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "the content has another hash"}, 400)
        self.hub.objects[oid] = body
        return self._json({})

    def _write_commit(self, body: bytes, repository: str) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                assert value["encoding"] == "base64"
                self.hub.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._json({"error": f"{value['path']} was never uploaded"}, 400)
                self.hub.files[repository][value["path"]] = self.hub.objects[value["oid"]]
        commit = hashlib.sha1(body + self.hub.revision(repository).encode()).hexdigest()
        self.hub.commits[repository].append(commit)
        url = f"{self.hub.endpoint}/{repository}/commit/{commit}"
        return self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    # -- reading -----------------------------------------------------------------------------------------------------------

    def _model(self, body: bytes, repository: str, revision: str | None = None) -> None:
        if repository not in self.hub.files:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": name} for name in sorted(self.hub.files[repository])]
        about = {"id": repository, "modelId": repository, "sha": self.hub.revision(repository), "siblings": siblings}
        return self._json({**about, "private": self.hub.private[repository], "tags": [], "downloads": 0})

    def _tree(self, body: bytes, repository: str, revision: str) -> None:
        files = self.hub.files.get(repository, {})
        return self._json(
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in sorted(files.items())
            ]
        )

    def _resolve(self, body: bytes, repository: str, revision: str, name: str) -> None:
        content = self.hub.files.get(repository, {}).get(name)
        if content is None:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": self.hub.revision(repository),
            "Content-Type": "application/octet-stream",
        }
        return self._answer(content, 200, headers)

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


_NAME = r"([\w.-]+/[\w.-]+)"
# Routes whose names begin with "write" need the token.
_ROUTES = {
    "write_repository": r"POST /api/repos/create",
    "write_preupload": rf"POST /api/models/{_NAME}/preupload/main",
    "write_batch": rf"POST /{_NAME}\.git/info/lfs/objects/batch",
    "object": r"PUT /objects/([0-9a-f]{64})",
    "write_commit": rf"POST /api/models/{_NAME}/commit/main",
    "validate": r"POST /api/validate-yaml",
    "model": rf"GET /api/models/{_NAME}(?:/revision/([\w]+))?",
    "tree": rf"GET /api/models/{_NAME}/tree/(\w+)",
    "resolve": rf"(?:GET|HEAD) /{_NAME}/resolve/(\w+)/(.+)",
}
