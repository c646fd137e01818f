"""The options that say how weights are measured, for the commands that measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import click

from reference_model.protocol import Protocol


def protocol_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a measuring protocol; those not given are `None`."""
    hints = get_type_hints(Protocol)
    for spec in reversed(fields(Protocol)):
        name = f"--{spec.name.replace('_', '-')}"
        kind = hints[spec.name]
        default = spec.default
        if kind is bool:
            name, default = f"{name}/--no-{name[2:]}", "on" if default else "off"
        option = click.option(
            name,
            spec.name,
            type=kind,
            default=None,
            help=f"{spec.metadata['help']}  [default: {default}]",
        )
        command = option(command)
    return command


def chosen_protocol(run_dir: Path, options: Mapping[str, Any]) -> Protocol:
    """The protocol of the run's sweep, if there was one, with the options given."""
    from reference_model.sweep_record import load_record

    record = load_record(run_dir)
    before = Protocol() if record is None else Protocol(**record.settings["protocol"])
    return replace(before, **{name: v for name, v in options.items() if v is not None})
