"""The page's server: files of the page, and answers of the runs as JSON, on this machine alone and without a file written."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from glf_fast import seeds
from glf_fast.errors import UserError
from glf_fast.exploring import answers
from glf_fast.exploring.answers import Answer
from glf_fast.exploring.loading import Opened
from glf_fast.exploring.uploads import MOST_BYTES, fitted, read_upload
from glf_fast.images import grid
from glf_fast.models import Encodes

__all__ = ["HOST", "Page", "listen", "serve"]

HOST = "127.0.0.1"
_HERE = Path(__file__).parent
_FILES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
# The browser itself keeps the page from asking any other machine for anything, and other pages from showing this one.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_MOST_SAMPLES = 64
_EXTENT = 3.0
# Small images are shown enlarged.
_SHOWN = 96


def listen(port: int) -> socket.socket:
    """A socket of this machine alone at a port; 0 for any free one.

    Raises:
        UserError: a port that does not exist, that is taken, or that needs an administrator.
    """
    if not 0 <= port < 65536:
        raise UserError(f"--port {port} does not exist; ports are 1 … 65535, and 0 for any free one")
    listening = socket.socket()
    if os.name == "posix":  # elsewhere this would share a port that is taken
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise UserError(
            f"--port {port} cannot be used ({error.strerror}); choose another one, or 0 for any free one"
        ) from error
    return listening


def serve(opened: Sequence[Opened], listening: socket.socket) -> None:
    """Answer the page until Ctrl-C."""
    page = Page(opened)
    threading.Thread(target=page.prepare, daemon=True).start()
    config = uvicorn.Config(
        page.application(),
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, _HEADERS)


async def _failed(_: Request, error: Exception) -> Response:
    message = "the explorer has failed at this; its terminal says where"
    return JSONResponse({"error": f"{message} ({type(error).__name__})"}, 500, _HEADERS)


class Page:
    """The page over these runs. One answer is computed at a time; uploads are held by the browser, not by the server."""

    def __init__(self, opened: Sequence[Opened]) -> None:
        self.opened = opened
        self._one = threading.Lock()

    def application(self) -> Starlette:
        """The page as an ASGI application."""
        routes = [
            Route("/", self.file),
            Route("/about", self.about),
            Route("/{name:str}", self.file),
            Route("/test/{place:str}", self.test_image),
            Route("/upload", self.upload, methods=["POST"]),
            Route("/runs/{run:int}/{action:str}", self.answer, methods=["POST"]),
        ]
        hosts = Middleware(
            TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]
        )  # no name that leads here from elsewhere
        return Starlette(routes=routes, middleware=[hosts], exception_handlers={HTTPException: _refused, 500: _failed})

    def prepare(self) -> None:
        """Compute what the first answer of a kind would otherwise wait for."""
        for run in self.opened:
            with contextlib.suppress(UserError):  # the answer then says it
                answers.prepare(run)

    async def file(self, request: Request) -> Response:
        """A file of the page."""
        name = request.path_params.get("name", "page.html")
        if name not in _FILES:
            raise HTTPException(404, f"there is no {name}")
        return FileResponse(_HERE / name, headers=_HEADERS, media_type=_FILES[name])

    async def about(self, _: Request) -> Response:
        """The runs, and what each of them can do."""
        runs = [
            {
                "name": run.name,
                "title": run.model.words.title,
                "shape": run.model.shape,
                "data": run.train.name,
                "abilities": run.abilities(),
                "components": run.codes.components if run.codes else (),
                "attributes": run.codes.attributes if run.codes else (),
                "encodes": isinstance(run.model, Encodes),
            }
            for run in self.opened
        ]
        about = {"runs": runs, "tests": len(self.opened[0].test), "map": answers.MAP, "extent": _EXTENT}
        return JSONResponse(about, headers=_HEADERS)

    async def test_image(self, request: Request) -> Response:
        """A test image of the first run, as the picker shows it."""
        images = self.opened[0].test.images
        place = request.path_params["place"]
        if not place.isdecimal() or len(place) > 9 or int(place) >= len(images):
            raise HTTPException(404, f"there is no test image {place[:40]}; the last one is {len(images) - 1}")
        return Response(_png(images[int(place)][None], 1), media_type="image/png", headers=_HEADERS)

    async def upload(self, request: Request) -> Response:
        """The picture in the body, in the size of each run, as PNG files for the page to hold."""
        content = await _body(request, "application/octet-stream")

        def read() -> list[str]:
            with self._one:  # reading changes a limit of Pillow's for a moment
                picture = read_upload(content)
                return [_text(_png(fitted(picture, run.model.shape)[None], 1, enlarged=False)) for run in self.opened]

        return await _answered(lambda: {"images": read()})

    async def answer(self, request: Request) -> Response:
        """An answer of one run to the arguments in the body."""
        run, action = request.path_params["run"], request.path_params["action"]
        if run >= len(self.opened) or action not in _ACTIONS:
            raise HTTPException(404, f"there is no {request.url.path}")
        try:
            body = json.loads(await _body(request, "application/json"))
        except (ValueError, RecursionError):
            raise HTTPException(400, "the arguments are not JSON") from None

        def compute() -> dict[str, Any]:
            with self._one:
                start = time.perf_counter()
                opened = self.opened[run]
                if not isinstance(body, dict):
                    raise UserError("the arguments are not an object")
                given = _ACTIONS[action](opened, _Arguments(body, opened, self.opened[0]))
                picture = _png(given.images, given.columns)
                milliseconds = 1000 * (time.perf_counter() - start)
            return {
                "picture": _text(picture),
                "columns": given.columns,
                "count": len(given.images),
                "lines": given.lines,
                "ms": round(milliseconds, 1),
            }

        return await _answered(compute)


async def _body(request: Request, kind: str) -> bytes:
    """The body of a request, which is in memory alone.

    A page of another site can send none of this kind without asking this server first, which does not allow it.
    """
    if request.headers.get("content-type") != kind:
        raise HTTPException(415, f"what is sent must be {kind}")
    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > MOST_BYTES:
                raise HTTPException(413, f"this file has more than {MOST_BYTES >> 20} MB; choose a smaller picture")
    except ClientDisconnect:
        raise HTTPException(400, "the request was not sent whole") from None
    return bytes(content)


async def _answered(compute: Callable[[], dict[str, Any]]) -> Response:
    try:
        return JSONResponse(await _in_thread(compute), headers=_HEADERS)
    except UserError as error:
        return JSONResponse({"error": str(error)}, 400, _HEADERS)
    except asyncio.CancelledError:  # Ctrl-C
        return JSONResponse({"error": "the explorer was stopped"}, 503, _HEADERS)


async def _in_thread(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a computation, in a thread that ends with the process: Ctrl-C does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[dict[str, Any]] = loop.create_future()

    def tell(method: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            method(value)

    def work() -> None:
        method: Callable[[Any], None] = future.set_result
        value: Any
        try:
            value = compute()
        except BaseException as error:
            method, value = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any longer
            loop.call_soon_threadsafe(tell, method, value)

    threading.Thread(target=work, daemon=True).start()
    return await future


class _Arguments:
    """The arguments of a request, checked as they are read; raises UserError for a missing or a wrong one."""

    def __init__(self, body: dict[str, Any], opened: Opened, first: Opened) -> None:
        self._body, self._opened, self._first = body, opened, first

    def number(self, name: str, low: float, high: float) -> float:
        """A number between low and high."""
        return _number(name, self._body.get(name), low, high)

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number between low and high."""
        value = self._body.get(name)
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"{name} must be a whole number between {low} and {high}; got {_quoted(value)}")
        return value

    def pair(self, name: str) -> list[Any]:
        """Two values."""
        value = self._body.get(name)
        if not isinstance(value, list) or len(value) != 2:
            raise UserError(f"{name} must have two entries; got {_quoted(value)}")
        return value

    def axes(self) -> tuple[str, str]:
        """Names of two directions."""
        right, up = map(str, self.pair("axes"))
        return right, up

    def place(self) -> tuple[float, float]:
        """A place of the plane."""
        right, up = (_number("at", value, -_EXTENT, _EXTENT) for value in self.pair("at"))
        return right, up

    def amounts(self) -> dict[str, float]:
        """Amounts of attributes by name."""
        value = self._body.get("amounts")
        if not isinstance(value, dict):
            raise UserError(f"amounts must have a number for each attribute; got {_quoted(value)}")
        if not all(map(str.isprintable, value)):
            raise UserError(f"names of attributes must be printable; got {_quoted([*value])}")
        return {name: _number(name, amount, -_EXTENT, _EXTENT) for name, amount in value.items()}

    def samples(self) -> Answer:
        """The samples that temperature and seed ask for."""
        count = self.whole("count", 1, _MOST_SAMPLES)
        return answers.sample(self._opened, count, self.number("temperature", 0, 2), self.whole("seed", 0, 2**31 - 1))

    def image(self, name: str) -> Tensor:
        """An image uint8 (C, H, W) of the run's shape: a test image of the first run, or an upload that the page holds."""
        value, shape = self._body.get(name), self._opened.model.shape
        value = value if isinstance(value, dict) else {}
        if isinstance(value.get("png"), str):
            try:
                content = base64.b64decode(value["png"], validate=True)
            except ValueError:
                raise UserError(f"{name} is not the PNG file of an image") from None
            return fitted(read_upload(content), shape)
        images, place = self._first.test.images, value.get("test")
        if type(place) is not int or not 0 <= place < len(images):
            raise UserError(f"{name} must be a test image between 0 and {len(images) - 1}; got {_quoted(place)}")
        if images.shape[1:] == shape:
            return images[place]
        return fitted(_picture(images[place]), shape)

    def origin(self) -> Tensor:
        """The code from which a plane starts: the mean, that of an image, or that of a sample."""
        codes, value = self._opened.codes, self._body.get("origin")
        if codes is None:
            raise UserError(f"{self._opened.model.words.title} has no codes")
        if value == "mean":
            return codes.mean
        if value == "sample":
            seed = self.whole("seed", 0, 2**31 - 1)
            return codes.draw(1.0, seeds.generator(seed, "explore", device=self._opened.device))
        return codes.encode(self.image("origin")[None])[0]


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{name} must be a number between {low:g} and {high:g}; got {_quoted(value)}")
    return float(value)


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"


def _nearest(opened: Opened, given: _Arguments) -> Answer:
    images = given.samples().images
    return answers.nearest(opened, images[given.whole("place", 0, len(images) - 1)])


_ACTIONS: dict[str, Callable[[Opened, _Arguments], Answer]] = {
    "sample": lambda _, given: given.samples(),
    "nearest": _nearest,
    "walk": lambda opened, given: answers.walk(opened, given.origin(), given.axes(), given.place()),
    "plane": lambda opened, given: answers.plane(opened, given.origin(), given.axes(), _EXTENT),
    "interpolate": lambda opened, given: answers.interpolate(opened, given.image("start"), given.image("end")),
    "edit": lambda opened, given: answers.edit(opened, given.image("image"), given.amounts()),
    "reconstruct": lambda opened, given: answers.reconstruct(opened, given.image("image")),
}


def _png(images: Tensor, columns: int, enlarged: bool = True) -> bytes:
    """A PNG file of images uint8 (N, C, H, W) in rows, without gaps; small ones may be enlarged by a whole factor."""
    picture = grid(images, columns, padding=0)
    scale = math.ceil(_SHOWN / images.shape[-1]) if enlarged else 1
    picture = picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    file = io.BytesIO()
    _picture(picture).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _picture(image: Tensor) -> Image.Image:
    """An image uint8 (C, H, W) as a picture of Pillow's."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
