"""File systems for tests: in memory, but slow, counted, and failing when they are told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Log:
    """What was asked of a file system.

    Attributes:
        requests: (kind, name, bytes) of each, in order.
        at_once: How many were answered at the same time, at most.
    """

    requests: list[tuple[str, str, int]] = field(default_factory=list)
    at_once: int = 0

    def of(self, kind: str) -> list[tuple[str, str, int]]:
        return [request for request in self.requests if request[0] == kind]

    @property
    def bytes_read(self) -> int:
        return sum(nbytes for _, _, nbytes in self.of("read"))


class ObjectStore(MemoryFileSystem):
    """An object store in memory: what is put is there at once, nothing can be renamed.

    Args:
        latency: Seconds that each request takes.
        before: Called with (kind, key) before each request is carried out.
        knows_create: Whether it can refuse to replace an object.
    """

    protocol = "objects"
    cachable = False  # each has files of its own
    async_impl = True  # as of all file systems of object stores

    def __init__(
        self,
        latency: float = 0.0,
        before: Callable[[str, str], object] = lambda kind, key: None,
        knows_create: bool = True,
    ) -> None:
        super().__init__(global_store=False, skip_instance_cache=True)
        self.log, self.latency, self.before = Log(), latency, before
        self._lock, self._active = threading.Lock(), 0
        if not knows_create:
            self.put_file = self._put_whatever  # type: ignore[method-assign]

    def at(self, path: str) -> Any:
        """A path as universal_pathlib has it."""
        return SimpleNamespace(fs=self, path=path)

    def reset(self) -> Log:
        self.log = Log()
        return self.log

    def _ask(self, kind: str, key: str, nbytes: int = 0) -> None:
        with self._lock:
            self._active += 1
            self.log.at_once = max(self.log.at_once, self._active)
            self.log.requests.append((kind, key.rpartition("/")[2], nbytes))
        try:
            time.sleep(self.latency)
            self.before(kind, key)
        finally:
            with self._lock:
                self._active -= 1

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._ask("list", path)
        return super().ls(path, detail=detail, **kwargs)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        self._ask("read", path, len(super().cat_file(path, start=start, end=end)))
        found: bytes = super().cat_file(path, start=start, end=end)
        return found

    def put_file(self, lpath: str, rpath: str, mode: str = "overwrite", **kwargs: Any) -> None:  # type: ignore[override]
        with open(lpath, "rb") as file:
            data = file.read()
        self._ask("put", rpath, len(data))
        self.pipe_file(rpath, data, mode=mode)

    def _put_whatever(self, lpath: str, rpath: str) -> None:
        ObjectStore.put_file(self, lpath, rpath)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        self._ask("copy", path2)
        super().cp_file(path1, path2)

    def rm_file(self, path: str) -> None:
        self._ask("delete", path)
        super().rm_file(path)


def crash_at(number: int, kinds: tuple[str, ...] = ("put", "copy", "delete")) -> Any:
    """For ``before``: the process ends at the n-th request that changes anything."""
    count = 0

    def check(kind: str, key: str) -> None:
        nonlocal count
        if kind in kinds:
            count += 1
            if count >= number:  # a process that has ended asks for nothing more
                raise Killed(f"{kind} {key}")

    return check


def names(fs: MemoryFileSystem, folder: str) -> set[str]:
    """Names of the files of a folder, those of its folders too."""
    start = f"/{folder.strip('/')}/"
    return {key.removeprefix(start) for key in fs.store if key.startswith(start)}
