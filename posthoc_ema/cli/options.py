"""How arguments and options are written, and what they turn into."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from math import inf
from pathlib import Path
from typing import Any

import click

from posthoc_ema.conversion import sigma_rel_to_gamma
from posthoc_ema.places import as_place
from posthoc_ema.profile_text import parse_profile
from posthoc_ema.profiles import PowerFunction, Profile
from posthoc_ema.snapshots import SnapshotStore
from posthoc_ema.solve import METHODS

Numbers = tuple[float, ...]

_MOST_VALUES = 1000


def parse_numbers(text: str) -> Numbers:
    """Numbers and ranges, separated by commas; the result holds each number once.

    ``a,b,...,c`` is the arithmetic progression from a in steps of b - a, which must end at c.

    Raises:
        ValueError: If a part is not a number, or a progression does not fit.

    Example:
        >>> parse_numbers("0.01,0.02,...,0.05,0.1")
        (0.01, 0.02, 0.03, 0.04, 0.05, 0.1)
    """
    parts = [part.strip() for part in text.split(",")]
    numbers: list[Decimal] = []  # decimal: 0.01 + 2 × 0.01 shall be 0.03, the same as typed
    for place, part in enumerate(parts):
        if part in ("...", "…"):
            before, after = parts[max(place - 2, 0) : place], parts[place + 1 : place + 2]
            if len(before) < 2 or not after:
                raise ValueError(
                    f"'...' in {text!r} needs two numbers before it and one after it, "
                    "as in 0.01,0.02,...,0.25"
                )
            numbers += _between(*(_decimal(p, text) for p in (*before, *after)))
        else:
            numbers.append(_decimal(part, text))
    return tuple(dict.fromkeys(float(number) for number in numbers))


def parse_bytes(text: str) -> float:
    """A size with or without a unit, in powers of 1000: ``20GB``.

    Raises:
        ValueError: If it is not a size > 0.

    Example:
        >>> parse_bytes("1.5 GB")
        1500000000.0
    """
    bare = text.strip().upper().removesuffix("B").rstrip()
    power = " KMGT".find(bare[-1:]) if bare[-1:].isalpha() else 0
    size = float(_decimal(bare[:-1] if power > 0 else bare, text)) * 1000**power
    if not size > 0:
        raise ValueError(f"expected a size > 0, such as 20GB (got {text})")
    return size


def parse_part(text: str) -> tuple[int, int]:
    """One of several parts: ``2/8``, or ``auto`` for that of this process under torchrun.

    Raises:
        ValueError: If it is neither, or torchrun did not start this process.

    Example:
        >>> parse_part("2/8")
        (2, 8)
    """
    if text.strip() == "auto":
        try:
            return int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"])
        except (KeyError, ValueError):
            raise ValueError(
                "'auto' needs RANK and WORLD_SIZE in the environment, which torchrun sets; "
                "with other launchers write the part, as in 2/8"
            ) from None
    number, slash, of = text.partition("/")
    if not slash or not (number.strip().isdigit() and of.strip().isdigit()):
        raise ValueError(f"expected a part such as 2/8, or auto (got {text})")
    if not 1 <= int(number) <= int(of):
        raise ValueError(f"parts are numbered from 1 to the number of parts (got {text})")
    return int(number), int(of)


class _Folder(click.ParamType):  # type: ignore[type-arg]
    name = "folder"

    def convert(self, value: Any, param: Any, ctx: Any) -> SnapshotStore:
        if isinstance(value, SnapshotStore):
            return value
        try:
            store = SnapshotStore(value)
            if not store.path.is_dir():
                problem = "is not a folder" if store.path.exists() else "does not exist"
            elif not any(store.scan()):
                problem = "holds no snapshots"
            else:
                return store
        except (ValueError, ModuleNotFoundError, OSError) as error:
            self.fail(str(error), param, ctx)
        self.fail(f"{value} {problem}; give the folder that EMA(snapshots=...) wrote", param, ctx)


class _Output(click.Path):  # type: ignore[type-arg]
    """Where something is written to: a local path, or a URL."""

    def __init__(self, local: bool = False, **options: Any) -> None:
        super().__init__(path_type=Path, **options)
        self._local = local

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            place = as_place(value)
        except (ValueError, ModuleNotFoundError) as error:
            self.fail(str(error), param, ctx)
        if isinstance(place, Path):
            return super().convert(str(place), param, ctx)
        if self._local:
            self.fail(f"{value} is a URL; give a local file", param, ctx)
        return place


class _Parsed(click.ParamType):  # type: ignore[type-arg]
    """A value made from text by a function that raises ValueError."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):  # click converts defaults once more
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _sigma_rels(text: str) -> Numbers:
    numbers = parse_numbers(text)
    sigma_rel_to_gamma(numbers)  # raises outside the domain
    return numbers


def _time(text: str) -> float:
    number = float(_decimal(text, text))
    if not 0 < number < inf:
        raise ValueError(f"expected a finite time > 0 (got {text})")
    return int(number) if number.is_integer() else number


def _tracks(text: str) -> Numbers | int:
    return int(text) if text.strip().isdigit() else _sigma_rels(text)


def _budget(text: str) -> tuple[float, bool]:
    """A number of snapshots or a size, and whether it is a size."""
    is_size = text.strip()[-1:].isalpha()
    return (parse_bytes if is_size else _time)(text), is_size


folder_argument = click.argument("store", metavar="FOLDER", type=_Folder())
out_folder_type, picture_type = _Output(file_okay=False), _Output(local=True, dir_okay=False)
folder_type, bytes_type, time_type = _Folder(), _Parsed("size", parse_bytes), _Parsed("time", _time)
part_type = _Parsed("part", parse_part)
tracks_type, budget_type = _Parsed("tracks", _tracks), _Parsed("budget", _budget)
numbers_type, parsed_profile = _Parsed("numbers", _sigma_rels), _Parsed("profile", parse_profile)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of a table."
)

time_option = click.option(
    "--t",
    type=_Parsed("time", _time),
    help="Time of the average, in the run's unit, up to the last snapshot's (the default). "
    "Later snapshots are not used.",
)

method_option = click.option(
    "--method",
    type=click.Choice(METHODS),
    default=METHODS[0],
    show_default=True,
    help="What the coefficients minimise: the expected error of the weights, or, as the paper "
    "does, the distance of the profiles; plain: raw checkpoints averaged as they are (LAWA, SWA).",
)

profile_option = click.option(
    "--profile",
    "profiles",
    type=parsed_profile,
    multiple=True,
    help="Another kind of average: exponential:halflife=1000 (in the run's unit), "
    "exponential:beta=0.9999 (per unit), uniform:window=0.2 (a fraction of the run; above 1, an "
    "amount), power:gamma=6.94. May be given several times.",
)


def sigma_rel_option(
    default: str | None = None,
    help: str = "EMA lengths, as fractions of training time: 0.05, or 0.05,0.1, or a range "
    "0.01,0.02,...,0.25.",
) -> Callable[[Any], Any]:
    """``--sigma-rel``, with the default that suits the command."""
    return click.option(
        "--sigma-rel",
        type=numbers_type,
        default=default,
        show_default=default is not None,
        help=help,
    )


def wanted_profiles(sigma_rel: Numbers | None, profiles: Sequence[Profile]) -> list[Profile]:
    """All averages that ``--sigma-rel`` and ``--profile`` ask for, each once."""
    return list(dict.fromkeys([*(PowerFunction(s) for s in sigma_rel or ()), *profiles]))


def out_option(help: str, type: Any = None) -> Callable[[Any], Any]:
    """``--out``, required; a file or folder at a path or URL, or what ``type`` says."""
    return click.option("--out", required=True, type=type or _Output(), help=help)


def _between(first: Decimal, second: Decimal, last: Decimal) -> list[Decimal]:
    """The progression after ``second`` and before ``last``."""
    step = second - first
    if not step or (last - second) / step < 0:
        raise ValueError(f"{first},{second},...,{last} does not lead to {last}")
    number = (last - second) / step
    if number > _MOST_VALUES:
        raise ValueError(f"{first},{second},...,{last} has more than {_MOST_VALUES} values")
    whole = int(number)
    if number != whole:
        below = second + whole * step
        raise ValueError(
            f"{first},{second},...,{last} does not fit: steps of {step} reach {below} and "
            f"{below + step}, not {last}"
        )
    return [second + k * step for k in range(1, whole)]


def _decimal(part: str, text: str) -> Decimal:
    try:
        number = Decimal(part)
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        where = f" in {text!r}" if part != text else ""
        raise ValueError(f"{part!r}{where} is not a number")
    return number
