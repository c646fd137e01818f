"""Tensors of PyTorch files as ranges of bytes: no framework, and nothing of the file executed.

What ``torch.save`` writes is a pickle that refers to storages beside it, in a zip archive or, in
files older than 1.6 and inside of ordinary pickles, behind the pickle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.encoding import ITEM_SIZE
from posthoc_ema.errors import CorruptSnapshotError, SnapshotError, UnsafePickleError
from posthoc_ema.importing.pickle_data import (
    Allowed,
    Global,
    Make,
    as_record,
    describe,
    read_pickle,
)
from posthoc_ema.importing.region import Cursor, Region

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128", "UntypedStorage": "U8",
}  # fmt: skip
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "complex128": "C128",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_ITEM_SIZE = {**ITEM_SIZE, "C128": 16}
_REBUILT = {
    "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter",
    "_rebuild_parameter_with_state",
}  # fmt: skip
_NAMES = (
    {f"torch.{name}" for name in (*_STORAGES, *_DTYPES, "Size", "device", "Tensor")}
    | {f"torch.storage.{name}" for name in (*_STORAGES, "TypedStorage")}
    | {f"torch._utils.{name}" for name in _REBUILT}
    | {"torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
    | {"torch.serialization._get_layout", "torch._tensor._rebuild_from_type_v2"}
)
_PLAIN = {
    "collections.OrderedDict", "collections.defaultdict", "collections.Counter",
    "builtins.dict", "builtins.list", "builtins.set", "builtins.frozenset", "builtins.bytes",
    "builtins.object", "builtins.int", "builtins.complex", "builtins.slice",
    "_codecs.encode", "copyreg._reconstructor", "copyreg.__newobj__",
    "numpy.dtype", "numpy.ndarray", "pathlib.PosixPath", "pathlib.Path", "argparse.Namespace",
    "pathlib._local.PosixPath", "pathlib.PurePosixPath", "types.SimpleNamespace",
    *(
        f"numpy.{core}.{name}"
        for core in ("core", "_core")
        for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
    ),
}  # fmt: skip
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
LOAD_STORAGE = "torch.storage._load_from_bytes"
_MOST_DIMENSIONS = 64  # of torch and numpy alike
_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP = b"PK\x03\x04"


def allowing(names: Iterable[str] = ()) -> Allowed:
    """Names that files of tensors may hold, and further ones; as data, all of them."""
    known = _NAMES | _PLAIN | set(names)
    return lambda found: str(found) in known


@dataclass(eq=False)
class Storage:
    """The bytes that tensors are views of.

    Attributes:
        dtype: Safetensors name of its type.
        size: Number of bytes.
        region: Where they are; None as long as that is unknown.
    """

    dtype: str
    size: int
    region: Region | None = None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: Safetensors name of its type.
        shape: Its shape.
        storage: What it is a view of.
        offset: Of its first element there.
        strides: In elements.
        parameter: Whether it is a parameter of a module.
    """

    dtype: str
    shape: tuple[int, ...]
    storage: Storage
    offset: int
    strides: tuple[int, ...]
    parameter: bool = False

    def __post_init__(self) -> None:
        numbers = (*self.shape, *self.strides, self.offset)
        if (
            len(self.shape) != len(self.strides)
            or len(self.shape) > _MOST_DIMENSIONS
            or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers)
        ):
            raise ValueError("a tensor of a shape, strides or offset that no tensor has")
        if prod(n for n in self.shape if n) >= 1 << 58:  # none of the libraries holds it, if empty
            raise ValueError("a tensor of a shape that no tensor has")
        held = self.storage.size // _ITEM_SIZE[self.dtype]
        # More elements than the storage has would be one value many times over: no weights.
        if self.count and (self.offset + self._span > held or self.count > held):
            raise ValueError(f"a tensor of shape {self.shape} in a storage of {held} elements")

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def _span(self) -> int:
        """Elements of the storage from its first to its last."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    def read(self) -> NDArray[np.uint8]:
        """Its bytes in order."""
        item = _ITEM_SIZE[self.dtype]
        if not self.count or self.storage.region is None:
            return np.empty(0, np.uint8)
        raw = self.storage.region.part(self.offset * item, self._span * item).read()
        expected, done = [], 1
        for n in reversed(self.shape):
            expected.append(done)
            done *= n
        if all(
            s == e
            for n, s, e in zip(self.shape, self.strides, expected[::-1], strict=True)
            if n > 1
        ):
            return raw
        strides = (*(s * item for s in self.strides), 1)
        view = np.lib.stride_tricks.as_strided(raw, (*self.shape, item), strides, writeable=False)
        return np.ascontiguousarray(view).reshape(-1)


def tensor_maker(path: Path) -> Make:
    """What stands for objects in a file: tensors and storages, and records of all others."""

    def make(maker: Global, args: tuple[Any, ...]) -> Any:
        name = str(maker)
        if name == LOAD_STORAGE:
            return _load_storage(path, args[0])
        if name in (
            "torch._utils._rebuild_parameter",
            "torch._utils._rebuild_parameter_with_state",
        ):
            if not isinstance(args[0], StoredTensor):
                raise ValueError("a parameter without a tensor")
            return replace(args[0], parameter=True)
        if name.startswith("torch._utils._rebuild_tensor"):
            storage, offset, shape, strides = args[:4]
            if not isinstance(storage, Storage):
                raise ValueError("a tensor without a storage")
            lazy = args[7:8] if name.endswith("_v3") else args[6:7]
            if lazy and lazy[0]:  # marks of conjugates and negatives, which are not in the bytes
                raise ValueError("a tensor that is a conjugate or negative of what is stored")
            dtype = (
                _DTYPES[describe(args[6]).removeprefix("torch.")]
                if name.endswith("_v3")
                else storage.dtype
            )
            return StoredTensor(dtype, tuple(shape), storage, offset, tuple(strides))
        if name == _FROM_TYPE:  # of a subclass, or with attributes
            inner = args[0]
            if not (isinstance(inner, Global) and str(inner).startswith("torch._utils._rebuild")):
                raise ValueError("a tensor that is made by another name")
            if not isinstance(args[2], tuple):
                raise ValueError("a tensor without a storage")
            return make(inner, args[2])
        if name == "torch.Size":
            return tuple(args[0])
        return as_record(maker, args)

    return make


def read_torch_file(path: Path, allowed: Allowed) -> Any:
    """What a file of ``torch.save`` holds, its tensors as :class:`StoredTensor`.

    Raises:
        UnsafePickleError: If it names code; nothing was executed.
        CorruptSnapshotError: If it is truncated, or something else.
    """
    if not is_zip(path):
        return _read_legacy(Region.of_file(path), allowed)
    members = _members(path)
    pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise CorruptSnapshotError(
            f"{path} is a zip archive, but not of torch.save; leave it out, or give its kind"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if any(name.startswith((f"{folder}code/", f"{folder}constants")) for name in members):
        raise UnsafePickleError(
            f"{path} is a TorchScript archive, which holds code; save its state dict instead"
        )
    order = members.get(f"{folder}byteorder")
    if order is not None and order.read().tobytes() != b"little":
        raise SnapshotError(f"{path} has the byte order of another machine; save it once more")

    def refer(key: Any) -> Storage:
        name, storage = _reference(key)
        storage.region = members[f"{folder}data/{name}"].part(0, storage.size)
        return storage

    return read_pickle(Cursor(members[pickles[0]]), allowed, tensor_maker(path), refer)


def is_zip(path: Path) -> bool:
    """Whether a file begins as a zip archive does."""
    with open(path, "rb") as file:
        return file.read(4) == _ZIP


def _members(path: Path) -> dict[str, Region]:
    """The files of an archive, which torch does not compress."""
    import zipfile

    whole, members = Region.of_file(path), {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                head = whole.part(info.header_offset, 30).read().tobytes()
                # Names and padding differ between this header and that of the directory.
                lengths = [int.from_bytes(head[k : k + 2], "little") for k in (26, 28)]
                start = info.header_offset + 30 + sum(lengths)
                if info.compress_type == zipfile.ZIP_STORED:
                    members[info.filename] = whole.part(start, info.file_size)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise CorruptSnapshotError(
            f"{path} is not a complete archive of torch.save ({error}); it was truncated or "
            "damaged. Restore it from a copy, or leave it out"
        ) from error
    return members


def _load_storage(path: Path, held: Any) -> Storage:
    """A storage that an ordinary pickle holds as the bytes of a file of its own."""
    if isinstance(held, bytes):
        held = Region(path, 0, len(held), held)
    if not isinstance(held, Region):
        raise ValueError("a storage without bytes")
    found = _read_legacy(held, allowing())
    if not isinstance(found, Storage):
        raise ValueError("what is saved as a storage is none")
    return found


def _read_legacy(region: Region, allowed: Allowed) -> Any:
    """The format that has storages behind the pickle; also inside other pickles."""
    cursor = Cursor(region)
    if read_pickle(cursor, allowed) != _MAGIC:
        raise CorruptSnapshotError(
            f"{region.path} is no file of torch.save; give what it is with kind=, or leave it out"
        )
    version, system = read_pickle(cursor, allowed), read_pickle(cursor, allowed)
    if version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise SnapshotError(
            f"{region.path} has an unknown version ({describe(version)}), or the byte order of "
            "another machine; save it once more"
        )
    storages: dict[str, Storage] = {}

    def refer(key: Any) -> Storage:
        name, storage = _reference(key)
        return storages.setdefault(name, storage)

    data = read_pickle(cursor, allowed, tensor_maker(region.path), refer)
    keys, start = read_pickle(cursor, allowed), cursor.place
    try:
        for key in keys:
            storage = storages[key]
            storage.region = region.part(start + 8, storage.size)  # first the number of elements
            start += 8 + storage.size
        missing = [key for key, storage in storages.items() if storage.region is None]
        if missing:
            raise LookupError(f"{len(missing)} storages are not there")
    except (EOFError, LookupError, TypeError) as error:
        raise CorruptSnapshotError(
            f"{region.path} lacks the numbers of a tensor ({error}); it was truncated or damaged. "
            "Restore it from a copy, or leave it out"
        ) from error
    return data


def _reference(key: Any) -> tuple[str, Storage]:
    """Name and kind of a storage beside the pickle."""
    if isinstance(key, tuple) and len(key) >= 5 and key[0] == "storage":
        kind, name, count = key[1], key[2], key[4]
        if (
            isinstance(kind, Global)
            and kind.name in _STORAGES
            and isinstance(name, str)
            and isinstance(count, int)
            and count >= 0
        ):
            dtype = _STORAGES[kind.name]
            return name, Storage(dtype, count * _ITEM_SIZE[dtype])
    raise ValueError(f"a reference to {describe(key)}")
