"""An object-store server on this machine, for as long as the tests run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import count

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

_numbers = count()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """URL of a server that talks like S3."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty folder there, with the environment that leads to it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{next(_numbers)}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}/runs"


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of an empty folder in memory."""

    def clear() -> None:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]

    clear()
    yield "memory://runs"
    clear()


@pytest.fixture(params=["memory", "bucket"])
def url(request: pytest.FixtureRequest) -> str:
    """URL of an empty folder, in memory and on the server."""
    found: str = request.getfixturevalue(request.param)
    return found
