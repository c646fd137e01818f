"""Where files lie: in a local folder, or on any file system that fsspec knows.

Local paths are :class:`pathlib.Path` and never touch fsspec. A URL becomes a :class:`RemotePath`,
which has those methods of a path that this library uses, and three of its own: fetching a range,
storing a whole file at once, and copying.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Lock
from typing import Any

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]+://")  # two letters at least: C:\ is a drive
_COLLAPSED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\](?![/\\])")

# What a file system may tell that changes when a file is replaced, best first.
_TAGS = ("ETag", "etag", "generation", "blob_id", "content_md5", "md5", "mtime", "created",
         "LastModified", "last_modified", "updated")  # fmt: skip

_CODES = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    TimeoutError: errno.ETIMEDOUT,
}


@dataclass(frozen=True)
class Status:
    """What a listing says of a file, by the names of :class:`os.stat_result`.

    Attributes:
        st_size: Its size.
        st_mtime_ns: In place of a time: what changes when the file is replaced.
    """

    st_size: int
    st_mtime_ns: str


class RemotePath:
    """A file or folder on a file system of fsspec.

    Args:
        fs: The file system.
        url: For people; begins with the protocol.
        key: For the file system.
        listing: What folders hold, as far as it was asked for: paths made from this one share
            it, and nothing is asked twice. None: ask each time.
    """

    def __init__(self, fs: Any, url: str, key: str, listing: _Listing | None = None) -> None:
        self.fs, self.url, self.key, self._listing = fs, url, key, listing

    # Names, as pathlib has them.

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and (self.key, self.fs) == (other.key, other.fs)

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (self.fs, self.url, self.key)  # another process looks for itself

    def __lt__(self, other: Any) -> bool:
        return bool(self.key < other.key)

    def __truediv__(self, name: str) -> RemotePath:
        return self._at(f"{self.url}/{name}", f"{self.key}/{name}")

    @property
    def name(self) -> str:
        """The last component."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The folder."""
        return self._at(self.url.rpartition("/")[0], self.key.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        """Another file of the same folder."""
        return self.parent / name

    def resolve(self) -> RemotePath:
        """Itself: there are no links."""
        return self

    def relative_to(self, folder: Place) -> str:
        """The rest of the path of something inside a folder."""
        return self.url.removeprefix(f"{folder}/")

    def fresh(self) -> RemotePath:
        """The same place, to be looked at anew, and once."""
        return RemotePath(self.fs, self.url, self.key, _Listing(self.fs))

    def listed(self) -> RemotePath:
        """The same place, with a listing to remember."""
        return self if self._listing is not None else self.fresh()

    # Looking.

    def exists(self) -> bool:
        """Whether there is such a file, or a folder with anything in it."""
        return self.name in self._seen(self.parent.key) or self.is_dir()

    def is_dir(self) -> bool:
        """Whether it is a folder with anything in it."""
        entries = self._seen(self.key)
        return bool(entries) and entries.keys() != {""}

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._seen(self.parent.key).get(self.name, {}).get("type") == "file"

    def stat(self) -> Status:
        """Size and tag.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        entry = self._seen(self.parent.key).get(self.name)
        if entry is None or entry["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "no such file", self.url)
        tag = next((entry[key] for key in _TAGS if entry.get(key) is not None), "")
        size = entry["size"]
        if size is None:  # a listing need not know it
            with self._asking():
                size = self.fs.info(self.key)["size"]
        return Status(int(size), str(tag))

    def iterdir(self) -> Iterator[RemotePath]:
        """What the folder holds."""
        for name in self._seen(self.key):
            if name:
                yield self / name

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What the folder holds under names of a pattern."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    # Reading.

    def fetch(self, start: int, stop: int) -> bytes:
        """A range of bytes, in one request; fewer if the file ends before."""
        with self._asking():
            data: bytes = self.fs.cat_file(self.key, start=start, end=stop)
        return data

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file."""
        with self._asking():
            text: str = self.fs.cat_file(self.key).decode(encoding)
        return text

    # Writing.

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: folders come with their files."""

    def upload(self, source: str | Path, new: bool = False) -> None:
        """Store a local file under this name, at once: until all is there, nothing is seen.

        Args:
            source: The local file.
            new: Refuse to replace another file.

        Raises:
            FileExistsError: If ``new``, and there is one; as far as the file system tells.
        """
        with self._asking():
            if self.fs.async_impl:
                # Object stores: what they put is there as a whole or not at all.
                self._put(str(source), new)
                return
            # Others may show a file while it grows, but rename it at once.
            hidden = self.with_name(f".{self.name}.{os.urandom(4).hex()}.tmp")
            try:
                self.fs.makedirs(self.parent.key, exist_ok=True)
                self.fs.put_file(str(source), hidden.key)
                if new and self.fs.exists(self.key):
                    raise FileExistsError(errno.EEXIST, "exists already", self.url)
                self.fs.mv(hidden.key, self.key)
            except BaseException:
                with suppress(Exception):
                    self.fs.rm_file(hidden.key)
                raise

    def _put(self, source: str, new: bool) -> None:
        put = self.fs.put_file
        try:
            put(source, self.key, **_exclusive(put, new))
        except Exception as error:
            if not new or isinstance(error, FileExistsError):
                raise
            if getattr(error, "errno", None) in (errno.ENOSYS, errno.ENOTSUP):
                put(source, self.key, **_exclusive(put, False))  # it cannot refuse
            elif self.fresh().is_file():  # not every client says why it was refused
                raise FileExistsError(errno.EEXIST, "exists already", self.url) from error
            else:
                raise

    def copy_to(self, other: RemotePath) -> None:
        """Copy a file within the file system."""
        with self._asking():
            if not self.fs.async_impl:
                self.fs.makedirs(other.parent.key, exist_ok=True)
            self.fs.cp_file(self.key, other.key)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete a file.

        Raises:
            FileNotFoundError: If there is none, where the file system tells.
        """
        try:
            with self._asking():
                self.fs.rm_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _at(self, url: str, key: str) -> RemotePath:
        return RemotePath(self.fs, url, key, self._listing)

    def _seen(self, folder: str) -> Mapping[str, Mapping[str, Any]]:
        listing = self._listing or _Listing(self.fs)
        with self._asking():
            return listing.entries(folder)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Errors of all kinds of clients as the operating system would raise them."""
        try:
            yield
        except OSError as error:
            known = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
            text = error.strerror or str(error) or type(error).__name__
            raise OSError(known or error.errno or errno.EIO, text, self.url) from error
        except Exception as error:  # clients have exceptions of their own
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", self.url) from error


class _Listing:
    """What folders hold: one request for each (or for each thousand files)."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._folders: dict[str, dict[str, Mapping[str, Any]]] = {}
        self._lock = Lock()

    def entries(self, folder: str) -> Mapping[str, Mapping[str, Any]]:
        """By name; empty if there is no such folder; with the name "" if it is a file."""
        with self._lock:
            if folder not in self._folders:
                self._folders[folder] = self._ask(folder)
            return self._folders[folder]

    def _ask(self, folder: str) -> dict[str, Mapping[str, Any]]:
        self._fs.invalidate_cache(folder)  # fsspec may remember an older answer
        try:
            found = self._fs.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        named = [(entry["name"].strip("/"), entry) for entry in found]
        own = folder.strip("/")
        return {
            "" if name == own else name.rpartition("/")[2]: entry
            for name, entry in named
            if name != own or entry["type"] == "file"
        }


Place = Path | RemotePath
"""A file or folder, wherever it lies."""


def as_place(path: Any, storage_options: Mapping[str, Any] | None = None) -> Place:
    """The place that a user names.

    Args:
        path: A local path, a URL, or an object with a file system ``fs`` of fsspec and a ``path``
            there, as universal_pathlib has.
        storage_options: For the file system of a URL: credentials, endpoint.

    Raises:
        ValueError: If it is a URL that passed through :class:`pathlib.Path`, which spoils it, or
            one of an unknown protocol.
        ModuleNotFoundError: If a package is missing that the URL needs.
    """
    if isinstance(path, RemotePath):
        return path
    if isinstance(path, Path) and type(path).__module__.startswith("pathlib"):
        text = str(path)
    elif hasattr(path, "fs") and hasattr(path, "path"):
        return _from_object(path)
    else:
        text = os.fspath(path)
    if _URL.match(text):
        local = text.startswith(("file://", "local://"))
        return _local(text) if local else _from_url(text, storage_options or {})
    if storage_options:
        raise ValueError(f"storage_options are for URLs, and {text} is a local path")
    if _COLLAPSED.match(text) and not os.path.exists(text.partition(":")[0] + ":"):
        raise ValueError(
            f"{text} looks like a URL that lost a slash, as in pathlib.Path; give the URL as text"
        )
    return Path(text)


def looked_at(place: Place) -> Place:
    """A place to be looked at: of a remote one, what it holds is asked for once."""
    return place.fresh() if isinstance(place, RemotePath) else place


def _local(url: str) -> Path:
    from urllib.parse import urlsplit
    from urllib.request import url2pathname  # slow to import

    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise ValueError(f"{url} names no local file; write file:///folder/name")
    return Path(url2pathname(parts.path))


def _from_url(url: str, options: Mapping[str, Any]) -> RemotePath:
    try:
        import fsspec
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{url} needs fsspec, which is not installed: pip install 'posthoc-ema[remote]', and "
            "the package of its protocol (s3fs, gcsfs, adlfs, ...)"
        ) from None
    try:
        fs, key = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:  # its message names the package of the protocol
        raise ModuleNotFoundError(f"{url} cannot be opened: {error}") from error
    return RemotePath(fs, url.rstrip("/"), key.rstrip("/"))


def _from_object(path: Any) -> Place:
    if "file" in _protocols(path.fs):
        return Path(path.path)
    key = path.fs._strip_protocol(path.path).rstrip("/")
    return RemotePath(path.fs, path.fs.unstrip_protocol(key), key)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _exclusive(put_file: Callable[..., Any], new: bool) -> dict[str, Any]:
    """How this file system is told whether it may replace a file; it may know no such thing."""
    import inspect

    known = inspect.signature(put_file).parameters
    wanted = {"mode": "create" if new else "overwrite", "overwrite": not new}
    return {key: value for key, value in wanted.items() if key in known}
