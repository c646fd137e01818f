"""What commands say: tables, JSON, help that keeps its layout, failures and exit statuses."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import click

from posthoc_ema.errors import PosthocEMAError
from posthoc_ema.places import RemotePath
from posthoc_ema.profiles import PowerFunction, Profile

DATA_SAYS_NO, MISUSE = 1, 2
"""Exit statuses beside 0. Scripts rely on them: 1 is an answer, 2 a mistake in the command."""


class DataSaysNo(click.ClickException):
    """One line on standard error, and exit status 1."""

    exit_code = DATA_SAYS_NO


class Misuse(click.ClickException):
    """One line on standard error, and exit status 2."""

    exit_code = MISUSE


class TeachingCommand(click.Command):
    """Leaves examples in its help as they were typed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.help = _keep_layout(self.help)


class TeachingGroup(click.Group):
    """Commands in the order given; exceptions of the library become one clear line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.help = _keep_layout(self.help)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which they were added, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; with ``--debug`` leave exceptions as they are."""
        if ctx.params["debug"]:
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `posthoc-ema list | head`: click ends quietly
        except PosthocEMAError as error:  # before ValueError, which some of them are too
            raise DataSaysNo(_one_line(error)) from error
        except (ValueError, ModuleNotFoundError, FileExistsError) as error:
            raise Misuse(_one_line(error)) from error
        except OSError as error:
            raise DataSaysNo(_one_line(error)) from error


command = partial(click.command, cls=TeachingCommand)
"""Decorator of every command."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns; those that hold numbers flush right."""
    rows = [list(row) for row in rows]
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = zip(row, widths, numeric, strict=True)
        lines.append("  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in cells))
    return "\n".join(line.rstrip() for line in lines)


def format_bytes(size: float) -> str:
    """A size for people, in powers of 1000: ``1.2 GB``."""
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
    """Something to know, on standard error: standard output is for the result."""
    click.echo(message, err=True)


def exit_with(complaints: Sequence[str]) -> None:
    """Say what is wrong, one line each, and end with status 1 if there is anything."""
    for complaint in complaints:
        note(f"Error: {complaint}")
    if complaints:
        raise click.exceptions.Exit(DATA_SAYS_NO)


def bytes_bar(what: str, total: int) -> Any:
    """A progress bar over bytes, shown on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None, delay=1)


def save_figure(axes: Any, path: Path) -> None:
    """Write the figure of some axes, in the format that the name ends in."""
    if path.suffix[1:].lower() not in axes.figure.canvas.get_supported_filetypes():
        raise click.UsageError(f"{path} must end in .png, .svg or .pdf")
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path)


def _keep_layout(text: str | None) -> str | None:
    """Mark paragraphs with indented lines, which click would otherwise wrap."""
    if text is None:
        return None
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(
        f"\b\n{p}" if any(line.startswith(" ") for line in p.splitlines()) else p
        for p in paragraphs
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).splitlines())


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell == "unknown"


def _plain(data: Any) -> Any:
    """Data that JSON can say: profiles, paths and numpy's numbers and arrays translated."""
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, Profile):
        return _plain(data.to_dict())
    if isinstance(data, (Path, RemotePath)):
        return str(data)
    if hasattr(data, "tolist"):
        data = data.tolist()
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not isfinite(data):
        return None
    return data
