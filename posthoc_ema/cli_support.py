"""What the commands share: how options are written, how results and failures are printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from posthoc_ema.conversion import sigma_rel_to_gamma
from posthoc_ema.errors import PosthocEMAError
from posthoc_ema.profiles import Exponential, PowerFunction, Profile, Uniform

if TYPE_CHECKING:
    from posthoc_ema.snapshots import SnapshotStore

DONE, DATA_SAYS_NO, MISUSE = 0, 1, 2
"""Exit statuses. Scripts rely on them: 1 is an answer, 2 is a mistake in the command."""

_MOST_VALUES = 1000
_PROFILES: Mapping[tuple[str, str], Any] = {
    ("exponential", "halflife"): Exponential,
    ("exponential", "beta"): Exponential.from_beta,
    ("uniform", "window"): Uniform,
    ("power", "sigma_rel"): PowerFunction,
    ("power", "gamma"): lambda value: PowerFunction(gamma=value),
}


class Failure(click.ClickException):
    """One line on standard error, and an exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(" ".join(message.splitlines()))
        self.exit_code = status


class CommandGroup(click.Group):
    """Commands in the order of definition; exceptions of the library become one clear line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which one meets them, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; with ``--debug`` leave exceptions as they are."""
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except PosthocEMAError as error:  # before ValueError, which some of them are too
            raise Failure(str(error), DATA_SAYS_NO) from error
        except (ValueError, ModuleNotFoundError) as error:
            raise Failure(str(error), MISUSE) from error
        except BrokenPipeError:
            raise  # `posthoc-ema list | head`: click ends quietly
        except OSError as error:
            raise Failure(str(error), DATA_SAYS_NO) from error


class FolderType(click.ParamType):
    """A folder of snapshots, as a store."""

    name = "folder"

    def convert(self, value: Any, param: Any, ctx: Any) -> SnapshotStore:
        """Check that there is something to work with."""
        from posthoc_ema.snapshots import SnapshotStore

        if isinstance(value, SnapshotStore):
            return value
        if not Path(value).is_dir():
            state = "is not a folder" if Path(value).exists() else "does not exist"
            self.fail(f"{value} {state}; give the folder that EMA(snapshots=...) wrote", param, ctx)
        store = SnapshotStore(value)
        if not any(store.scan()):
            self.fail(
                f"{value} holds no snapshots; give the folder that EMA(snapshots=...) wrote",
                param,
                ctx,
            )
        return store


class SigmaRelType(click.ParamType):
    """EMA lengths: ``0.05``, ``0.05,0.07`` or ``0.01,0.02,...,0.25``."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """The numbers in the order given, each once."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = parse_numbers(value)
            sigma_rel_to_gamma(numbers)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return numbers


class ProfileType(click.ParamType):
    """Any averaging profile, as ``kind:field=value``."""

    name = "profile"

    def convert(self, value: Any, param: Any, ctx: Any) -> Profile:
        """A profile such as ``exponential:halflife=1000``."""
        if isinstance(value, Profile):
            return value
        kind, _, setting = str(value).partition(":")
        key, _, number = setting.partition("=")
        make = _PROFILES.get((kind.strip(), key.strip()))
        if make is None:
            forms = ", ".join(f"{k}:{f}=..." for k, f in _PROFILES)
            self.fail(f"{value!r} is no profile; the forms are {forms}", param, ctx)
        try:
            profile: Profile = make(float(number))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)
        return profile


class TimeType(click.ParamType):
    """A training time, an integer where it is one."""

    name = "time"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """A finite number > 0."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not 0 < number < float("inf"):
            self.fail(f"expected a finite time > 0 (got {value})", param, ctx)
        return int(number) if number.is_integer() else number


def parse_numbers(text: str) -> tuple[float, ...]:
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
            numbers += _progression(*(_decimal(p, text) for p in (*before, *after)))
        else:
            numbers.append(_decimal(part, text))
    return tuple(dict.fromkeys(float(number) for number in numbers))


def _decimal(part: str, text: str) -> Decimal:
    try:
        number = Decimal(part)
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        raise ValueError(
            f"{part!r} in {text!r} is not a number; write 0.05, or 0.05,0.10, or 0.01,0.02,...,0.25"
        )
    return number


def _progression(first: Decimal, second: Decimal, last: Decimal) -> list[Decimal]:
    """What follows ``second``, up to and including ``last``."""
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
    return [second + k * step for k in range(1, whole + 1)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns; those that hold numbers flush right."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    numeric = [all(_is_number(cell) for cell in column) for column in zip(*rows, strict=True)]
    numeric = numeric or [False] * len(header)
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = zip(row, widths, numeric, strict=True)
        lines.append("  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in cells))
    return "\n".join(line.rstrip() for line in lines)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell in ("-", "unknown")


def format_bytes(size: float) -> str:
    """A size for people: ``1.2 GB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_error(value: float) -> str:
    """A relative error for people; NaN is what a single snapshot cannot tell."""
    return f"{value:.2e}" if isfinite(value) else "unknown"


def format_profile(profile: Profile) -> str:
    """A profile as short as it can be said."""
    if isinstance(profile, PowerFunction):
        return f"sigma_rel={profile.sigma_rel:.10g}"
    return repr(profile)


def echo_json(data: Any) -> None:
    """One JSON document on standard output; NaN and infinity as null."""
    click.echo(json.dumps(_plain(data), indent=2, allow_nan=False))


def note(message: str) -> None:
    """Something to know, on standard error, so that standard output stays the result."""
    click.echo(message, err=True)


def _plain(data: Any) -> Any:
    """Data that JSON can say: numpy's numbers and arrays, profiles and paths included."""
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, Profile):
        return _plain(data.to_dict())
    if isinstance(data, Path):
        return str(data)
    if hasattr(data, "tolist"):
        data = data.tolist()
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not isfinite(data):
        return None
    return data
