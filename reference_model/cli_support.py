"""What the commands share: options, number lists, and errors shown as a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import click

run_dir_option = click.option(
    "--run-dir",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory of the run.",
)


class Device(click.ParamType):  # type: ignore[type-arg]
    """A device that torch can compute on here."""

    name = "DEVICE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name as it is, or fail saying why it cannot be used."""
        if value == "cpu":
            return value
        import torch

        try:
            kind = torch.device(value).type
            found = kind == "cpu" or torch.get_device_module(kind).is_available()
        except RuntimeError:
            self.fail(f"{value!r} is no device; give cpu, cuda, cuda:1, ...", param, ctx)
        if not found:
            self.fail(f"PyTorch finds no {kind} device here; --device cpu works", param, ctx)
        return value


device_option = click.option(
    "--device",
    type=Device(),
    default="cpu",
    show_default=True,
    help="Where to compute: cpu, cuda, cuda:1, ...",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")

quiet_option = click.option("--quiet", is_flag=True, help="No progress bar.")

threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads; one is as fast as two for networks as small as the digits'.",
)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Show errors that tell the user what to do as a line instead of a traceback."""
    try:
        yield
    except (ValueError, NotImplementedError, OSError) as error:
        raise click.ClickException(str(error)) from error


class SigmaRels(click.ParamType):  # type: ignore[type-arg]
    """EMA lengths such as ``0.05,0.1`` or ``0.01,0.02,...,0.25``."""

    name = "A,B,...,C"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the numbers, each once, or fail saying what was expected."""
        try:
            # Decimals: 0.01 + 2 × 0.01 shall be 0.03, the same as typed.
            numbers: list[Decimal] = []
            parts = [part.strip() for part in value.split(",")]
            for place, part in enumerate(parts):
                if part in ("...", "…"):
                    last = Decimal(parts[place + 1])
                    step = numbers[-1] - numbers[-2]
                    if step <= 0 or (last - numbers[-1]) % step:
                        self.fail(f"{value!r}: steps of {step} do not lead to {last}", param, ctx)
                    while numbers[-1] + step < last:
                        numbers.append(numbers[-1] + step)
                else:
                    numbers.append(Decimal(part))
            return tuple(dict.fromkeys(float(number) for number in numbers))
        except (InvalidOperation, IndexError):
            self.fail(f"{value!r} is not of the form 0.05,0.1 or 0.01,0.02,...,0.25", param, ctx)


def set_threads(threads: int | None) -> None:
    """Limit torch's CPU threads; `None` leaves its choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def parse_numbers(text: str, what: str) -> list[int]:
    """Read numbers and inclusive ranges: "0-3,10" is [0, 1, 2, 3, 10].

    Raises:
        click.UsageError: If the text is anything else.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            numbers += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise click.UsageError(f"{what} must look like 0-63 or 1,5,9 (got {text!r})") from None
    if not numbers:
        raise click.UsageError(f"{what} must name at least one number (got {text!r})")
    return numbers
