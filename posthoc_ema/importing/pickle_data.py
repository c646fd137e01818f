"""Pickles as data: an interpreter that has no operation that calls anything.

A pickle is a program for a stack machine that may name any function of any module and call it.
Here a name becomes a :class:`Global`, a call a :class:`Record` of what was to be called with what;
both are inert. Names outside an allow list are refused all the same: a file that asks for
``os.system`` is no set of weights, whatever else it holds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from posthoc_ema.errors import CorruptSnapshotError, UnsafePickleError
from posthoc_ema.importing.region import Cursor, Region

_LARGE = 4096
"""Bytes strings from this size on stay in the file."""

_MOST_OPERATIONS = 10_000_000
"""Operations of one pickle: a hundred make a tensor, and each may take a hundred bytes."""
_MOST_ARGUMENTS = 100

_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "UserDict": "collections"}
_MARK = object()
_KEYS = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True)
class Global:
    """The name of a class or function, and nothing behind it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """What was to be made: by what, from what, and what was to be put into it.

    Attributes:
        maker: Class or function named.
        args: Its arguments.
        state: What the object was to be restored from.
        items: What it was to hold as a list.
        entries: What it was to hold as a mapping.
    """

    maker: Global
    args: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)


Allowed = Callable[[Global], bool]
Make = Callable[[Global, tuple[Any, ...]], Any]


def describe(value: Any) -> str:
    """A few words for messages about what a file holds, which may hold itself a million times."""
    if isinstance(value, str):
        return value[:80]
    if value is None or isinstance(value, Global) or (isinstance(value, int) and -99 < value < 999):
        return str(value)[:80]
    return f"a {type(value).__name__}"


def as_record(maker: Global, args: tuple[Any, ...]) -> Any:
    """A record of a call; plain data where it is no more than that."""
    name = str(maker)
    if name == "copyreg._reconstructor" and args and isinstance(args[0], Global):
        return Record(args[0], args[1:])
    if name in ("collections.OrderedDict", "builtins.dict") and not args:
        return {}
    if name in ("builtins.set", "builtins.frozenset", "builtins.list") and len(args) <= 1:
        values = args[0] if args else []
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{name} of what is no list")
        return list(values) if name == "builtins.list" else set(map(_key, values))
    if name == "builtins.bytes" and not args:
        return b""
    if name == "_codecs.encode" and args[1:] == ("latin1",) and isinstance(args[0], str):
        return args[0].encode("latin1")  # how protocol 2 writes bytes
    return Record(maker, args)


def read_pickle(
    cursor: Cursor,
    allowed: Allowed,
    make: Make = as_record,
    refer: Callable[[Any], Any] | None = None,
) -> Any:
    """Interpret one pickle; the cursor stands behind it afterwards.

    Args:
        cursor: Where it begins.
        allowed: Which names it may hold.
        make: What stands for an object, by the name of what makes it and the arguments.
        refer: What stands for a thing beside the pickle, by its key; None: nothing is beside it.

    Returns:
        Plain Python data, :class:`Record` where an object was to be made, and
        :class:`~posthoc_ema.importing.region.Region` for large byte strings.

    Raises:
        UnsafePickleError: If it names anything else; nothing was executed.
        CorruptSnapshotError: If it is truncated, or no pickle.
    """
    path = cursor.region.path
    try:
        return _Machine(cursor, allowed, make, refer).run()
    except UnsafePickleError:
        raise
    except (EOFError, LookupError, ValueError, TypeError, RecursionError, struct.error) as error:
        raise CorruptSnapshotError(
            f"{path} is not a complete pickle of weights ({error}); it was truncated or damaged, "
            "or is something else. Restore it from a copy, or leave it out"
        ) from error


class _Machine:
    def __init__(
        self,
        cursor: Cursor,
        allowed: Allowed,
        make: Make,
        refer: Callable[[Any], Any] | None,
    ) -> None:
        self.cursor, self.allowed, self._make, self._refer = cursor, allowed, make, refer
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}  # a mapping: indices are not sizes
        self._given = 0  # to calls, which may copy it

    def run(self) -> Any:
        count = 0
        while (code := self.cursor.take(1)) != b".":
            count += 1
            if count > _MOST_OPERATIONS:
                raise ValueError(f"it has more than {_MOST_OPERATIONS} operations")
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise ValueError(f"{code!r} at byte {self.cursor.place - 1} is no operation")
            operation(self)
        return self.pop()

    # The stack

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark stands where a value should")
        return value

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("a mark is missing")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    # Numbers, strings and names

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.cursor.take(struct.calcsize(form)))[0]

    def long(self, size: int) -> int:
        return int.from_bytes(self.cursor.take(size), "little", signed=True)

    def bytes(self, size: int) -> Any:
        return self.cursor.take(size) if size < _LARGE else self.cursor.skip(size)

    def text(self, size: int) -> str:
        return str(self.cursor.take(size), "utf-8", "surrogatepass")

    def line(self) -> str:
        return self.cursor.line().decode("utf-8")

    def name(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a name is no text")
        found = Global(_OLD_MODULES.get(module, module), name)
        if not self.allowed(found):
            self.refuse(str(found))
        return found

    def refuse(self, what: str) -> None:
        raise UnsafePickleError(
            f"{self.cursor.region.path} refers to {what:.200}, which weights have no need of; "
            "nothing was executed. If you know what it is, allow it by its name: it is then read "
            "as data, and not executed either"
        )

    # Objects

    def make(self, maker: Any, args: Any) -> None:
        if not isinstance(maker, Global) or not isinstance(args, tuple):
            raise ValueError("what was to be called has no name")
        if len(args) > _MOST_ARGUMENTS:
            raise ValueError(f"a call of {len(args)} arguments")
        self.give(args)
        for value in args:
            self.give(value)
        self.push(self._make(maker, args))

    def give(self, value: Any) -> None:
        """Count what calls are given: one thing may go to many, each of which may copy it."""
        self._given += _size(value)
        if self._given > 4 * self.cursor.region.size + 4096:
            raise ValueError("calls are given many times what the file holds")

    def build(self) -> None:
        state = self.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):  # state dicts have versions as an attribute
            raise ValueError("a state is given to what has none")

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(map(_key, values))
            return
        items = target.items if isinstance(target, Record) else target
        if not isinstance(items, list):
            raise ValueError("items are given to what is no list")
        items.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Record) else target
        if not isinstance(entries, dict) or len(values) % 2:
            raise ValueError("entries are given to what is no mapping")
        entries.update(zip(map(_key, values[::2]), values[1::2], strict=True))

    def refer(self, key: Any) -> None:
        if self._refer is None:
            self.refuse(f"something outside of it ({describe(key)})")
        else:
            self.push(self._refer(key))

    def remember(self, place: int) -> None:
        if self.stack[-1] is _MARK:
            raise ValueError("a mark cannot be remembered")
        self.memo[place] = self.stack[-1]

    def pop_many(self, count: int) -> tuple[Any, ...]:
        values = [self.pop() for _ in range(count)]
        return tuple(reversed(values))

    def nothing(self) -> None:
        """A frame, or the protocol: all that is in it is read as it comes."""


def _key(value: Any) -> Any:
    for part in value if isinstance(value, tuple) else (value,):
        if not isinstance(part, _KEYS):
            raise ValueError(f"a {type(part).__name__} cannot be a key")
        if isinstance(part, int) and part.bit_length() > 64:  # any number of them hash alike
            raise ValueError(f"a number of {part.bit_length()} bits cannot be a key")
    return value


def _size(value: Any) -> int:
    """How much copying it would take."""
    if isinstance(value, Region):
        return value.size
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | set) else 0


def _string(line: str) -> str:
    return line[1:-1]  # of protocol 0, with its quotes; escapes are left as they are


def _integer(line: str) -> int | bool:
    return {"00": False, "01": True}[line] if line in ("00", "01") else int(line)


_OPERATIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.cursor.take(1),
    b"\x95": lambda m: m.cursor.take(8),
    b"(": lambda m: m.push(_MARK),
    b"0": lambda m: m.stack.pop(),
    b"1": lambda m: m.pop_to_mark(),
    b"2": lambda m: m.push(m.stack[-1]),
    # Constants
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(_integer(m.line())),
    b"L": lambda m: m.push(int(m.line().rstrip("L"))),
    b"F": lambda m: m.push(float(m.line())),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"G": lambda m: m.push(m.number(">d")),
    b"\x8a": lambda m: m.push(m.long(m.number("<B"))),
    b"\x8b": lambda m: m.push(m.long(m.number("<I"))),
    b"S": lambda m: m.push(_string(m.line())),
    b"V": lambda m: m.push(m.line()),
    b"T": lambda m: m.push(m.bytes(m.number("<I"))),
    b"U": lambda m: m.push(m.bytes(m.number("<B"))),
    b"X": lambda m: m.push(m.text(m.number("<I"))),
    b"\x8c": lambda m: m.push(m.text(m.number("<B"))),
    b"\x8d": lambda m: m.push(m.text(m.number("<Q"))),
    b"B": lambda m: m.push(m.bytes(m.number("<I"))),
    b"C": lambda m: m.push(m.bytes(m.number("<B"))),
    b"\x8e": lambda m: m.push(m.bytes(m.number("<Q"))),
    b"\x96": lambda m: m.push(m.bytes(m.number("<Q"))),
    # Containers
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b")": lambda m: m.push(()),
    b"\x8f": lambda m: m.push(set()),
    b"l": lambda m: m.push(m.pop_to_mark()),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"\x85": lambda m: m.push(m.pop_many(1)),
    b"\x86": lambda m: m.push(m.pop_many(2)),
    b"\x87": lambda m: m.push(m.pop_many(3)),
    b"d": lambda m: _new_mapping(m),
    b"\x91": lambda m: m.push(set(map(_key, m.pop_to_mark()))),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b"\x90": lambda m: m.append(m.pop_to_mark()),
    b"s": lambda m: m.set_items(list(m.pop_many(2))),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    # Memo
    b"p": lambda m: m.remember(int(m.line())),
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"g": lambda m: m.push(m.memo[int(m.line())]),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    # Names, and what was to be called
    b"c": lambda m: m.push(m.name(m.line(), m.line())),
    b"\x93": lambda m: m.push(m.name(*m.pop_many(2))),
    b"i": lambda m: m.make(m.name(m.line(), m.line()), tuple(m.pop_to_mark())),
    b"o": lambda m: _old_object(m),
    b"R": lambda m: m.make(*m.pop_many(2)),
    b"\x81": lambda m: m.make(*m.pop_many(2)),
    b"\x92": lambda m: _with_keywords(m),
    b"b": lambda m: m.build(),
    b"P": lambda m: m.refer(m.line()),
    b"Q": lambda m: m.refer(m.pop()),
    b"\x82": lambda m: m.refuse(f"the extension {m.number('<B')}"),
    b"\x83": lambda m: m.refuse(f"the extension {m.number('<H')}"),
    b"\x84": lambda m: m.refuse(f"the extension {m.number('<i')}"),
    b"\x97": lambda m: m.refuse("buffers outside of it"),
    b"\x98": lambda m: m.refuse("buffers outside of it"),
}
"""All operations of protocols 0 to 5, by their code."""


def _new_mapping(machine: _Machine) -> None:
    values = machine.pop_to_mark()
    machine.push({})
    machine.set_items(values)


def _old_object(machine: _Machine) -> None:
    maker, *args = machine.pop_to_mark()
    machine.make(maker, tuple(args))


def _with_keywords(machine: _Machine) -> None:
    maker, args, keywords = machine.pop_many(3)
    if not isinstance(keywords, dict):
        raise ValueError("keywords are no mapping")
    machine.make(maker, args)
    machine.give(keywords)
    if keywords and isinstance(machine.stack[-1], Record):
        machine.stack[-1].entries.update(keywords)
