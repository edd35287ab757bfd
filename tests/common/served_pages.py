"""The explorer's page, served by a thread of the test's own process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from glf_fast.exploring.loading import Opened
from glf_fast.exploring.server import Page, listen

__all__ = ["served"]


@contextmanager
def served(*opened: Opened) -> Iterator[int]:
    """The port of a server that answers as long as the block runs."""
    page = Page(opened).application()
    config = uvicorn.Config(page, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1)
    server, listening = uvicorn.Server(config), listen(0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
