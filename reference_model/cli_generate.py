"""The command that makes images: generate."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import click

from reference_model.cli_support import (
    device_option,
    errors_as_messages,
    parse_numbers,
    quiet_option,
    run_dir_option,
    set_threads,
    threads_option,
)
from reference_model.sampler_config import SamplerConfig

if TYPE_CHECKING:
    from reference_model.guidance import Guide


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Two numbers with a separator between them.

    Args:
        kind: Their type.
        separator: What stands between them.
        name: Shown in the help.
    """

    def __init__(self, kind: type, separator: str, name: str) -> None:
        self.kind, self.separator, self.name = kind, separator, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the pair, or fail saying what was expected."""
        try:
            first, second = map(self.kind, value.split(self.separator))
            return first, second
        except ValueError:
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)


INTERVAL = Numbers(float, ",", "LO,HI")
PART = Numbers(int, "/", "I/N")

# What describes a guide, as `--guidance-<key>` for one guide or `<key>=...` within `--guide`.
GUIDE_KEYS: dict[str, tuple[Any, str]] = {
    "sigma-rel": (click.FLOAT, "EMA length of the guide.  [default: that of --sigma-rel]"),
    "run-dir": (
        click.Path(file_okay=False, path_type=Path),
        "Run of the guide: a smaller, less trained or unconditional one.  [default: --run-dir]",
    ),
    "t": (
        click.FLOAT,
        "Time of the guide's average, in images: a less trained guide.  [default: the last]",
    ),
    "interval": (INTERVAL, "Guide only at noise levels above LO and up to HI."),
}


class GuideText(click.ParamType):  # type: ignore[type-arg]
    """A whole guide: `guidance=1.5 sigma-rel=0.2 run-dir=runs/other`."""

    name = "KEY=VALUE ..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the values by key, or fail saying which keys there are."""
        kinds = {"guidance": click.FLOAT, **{key: kind for key, (kind, _) in GUIDE_KEYS.items()}}
        values: dict[str, Any] = {}
        for word in shlex.split(value):
            key, equals, text = word.partition("=")
            if not equals or key not in kinds:
                self.fail(f"{word!r} is none of {', '.join(f'{k}=...' for k in kinds)}", param, ctx)
            values[key] = kinds[key].convert(text, param, ctx)
        if "guidance" not in values:
            self.fail(f"{value!r} does not say how strong: add guidance=...", param, ctx)
        return values


def guidance_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of one guide, and `--guide` for more."""
    more = "A further guide, such as --guide 'guidance=1.5 run-dir=runs/unconditional'; repeatable."
    command = click.option("--guide", "more_guides", type=GuideText(), multiple=True, help=more)(
        command
    )
    for key, (kind, text) in reversed(GUIDE_KEYS.items()):
        name = f"guidance_{key.replace('-', '_')}"
        command = click.option(f"--guidance-{key}", name, type=kind, help=text)(command)
    strength = "Strength w of guidance: D = w·D_main + (1 − w)·D_guide; 1: none."
    return click.option("--guidance", type=float, help=strength)(command)


def sampler_options(*, without: Collection[str] = ()) -> Callable[..., Any]:
    """Give a command one option for each field of `SamplerConfig`.

    Args:
        without: Fields that it has no option for.
    """
    hints = get_type_hints(SamplerConfig)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for spec in reversed([f for f in fields(SamplerConfig) if f.name not in without]):
            kind = click.Choice(["heun", "euler"]) if spec.name == "sampler" else hints[spec.name]
            command = click.option(
                f"--{spec.name.replace('_', '-')}",
                spec.name,
                type=kind,
                default=spec.default,
                show_default=True,
                help=spec.metadata["help"],
            )(command)
        return command

    return decorate


@click.command()
@run_dir_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for grid.png and one PNG for each seed.",
)
@click.option("--sigma-rel", type=float, help="EMA length, as a fraction of training time.")
@click.option("--raw", is_flag=True, help="Use the raw training weights instead of an average.")
@click.option(
    "--seeds", default="0-63", show_default=True, help="One image for each, as in 0-9,17."
)
@click.option(
    "--class", "--classes", "classes", help="Classes, taken in turn, as in 0-9; otherwise random."
)
@guidance_options
@sampler_options()
@click.option("--batch-size", default=64, show_default=True, help="Does not change the images.")
@device_option
@threads_option
@click.option(
    "--part", type=PART, help="Make part I of N (1/N to N/N); torchrun sets this by itself."
)
@click.option("--overwrite", is_flag=True, help="Replace images that other options made.")
@click.option("--scale", type=click.IntRange(min=1), help="Magnification of the pixels.")
@quiet_option
def generate(
    run_dir: Path,
    out: Path,
    sigma_rel: float | None,
    raw: bool,
    seeds: str,
    classes: str | None,
    guidance: float | None,
    more_guides: tuple[dict[str, Any], ...],
    batch_size: int,
    device: str,
    threads: int | None,
    part: tuple[int, int] | None,
    overwrite: bool,
    scale: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Generate images from a run, at any EMA length, with or without guidance.

    The weights are reconstructed from the run's snapshots, so --sigma-rel need not be one of
    the lengths that training tracked. A seed gives the same image whatever the others are.
    Interrupt at will: the same command keeps the images that are there and makes the others.

    \b
    Guidance by another EMA length of the same run needs no second training:
      generate --run-dir runs/digits --sigma-rel 0.10 \\
        --guidance 2 --guidance-sigma-rel 0.25 --out samples
    Classifier-free guidance by an unconditional network (trained with --label-dim 0):
      generate ... --guidance 1.5 --guidance-run-dir runs/unconditional
    Only at middle noise levels:
      generate ... --guidance 2 --guidance-run-dir runs/small --guidance-interval 0.28,2.9
    On all GPUs of a machine, or as the second of four jobs:
      torchrun --nproc-per-node gpu -m reference_model generate --device cuda ...
      python -m reference_model generate ... --part 2/4
    """  # noqa: D301 (click takes \\b for the character)
    from reference_model.generate import generate as run_generate

    if (sigma_rel is None) == (not raw):
        raise click.UsageError("give either --sigma-rel, such as --sigma-rel 0.1, or --raw")
    wanted = guides_wanted(guidance, more_guides, options)
    set_threads(threads)
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    with errors_as_messages():
        done = run_generate(
            run_dir,
            out,
            parse_numbers(seeds, "seeds"),
            sigma_rel=sigma_rel,
            guides=[as_guide(values, run_dir, sigma_rel) for values in wanted],
            classes=None if classes is None else parse_numbers(classes, "classes"),
            sampler=SamplerConfig(**options),
            part=part or (rank + 1, count),
            overwrite=overwrite,
            scale=scale,
            batch_size=batch_size,
            device=device,
            progress=not quiet and (part is not None or rank == 0),
        )
    kept = f" ({done.kept:,} were there)" if done.kept else ""
    click.echo(f"Wrote {done.grid or f'{done.made:,} images to {out}'}{kept}")


def guides_wanted(
    guidance: float | None, more_guides: Sequence[dict[str, Any]], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return what `guidance_options` gave, for `as_guide`, and take it out of the other options.

    Raises:
        click.UsageError: If something is said of a guide, but not how strong it is.
    """
    of_guide = {key: options.pop(f"guidance_{key.replace('-', '_')}") for key in GUIDE_KEYS}
    if guidance is not None:
        return [{"guidance": guidance, **of_guide}, *more_guides]
    if any(value is not None for value in of_guide.values()):
        raise click.UsageError("a guide without strength: add --guidance, such as --guidance 1.5")
    return list(more_guides)


def as_guide(values: dict[str, Any], run_dir: Path, sigma_rel: float | None) -> Guide:
    """Return the guide that options describe.

    Args:
        values: `guidance` and those of `GUIDE_KEYS` that were given.
        run_dir: Run of the network to be guided.
        sigma_rel: Its EMA length; `None` for raw weights.

    Raises:
        click.UsageError: If guide and network are the same.
    """
    from reference_model.averages import Weights
    from reference_model.guidance import Guide

    length = values.get("sigma-rel")
    weights = Weights(
        values.get("run-dir") or run_dir,
        sigma_rel if length is None else length,
        values.get("t"),
    )
    if weights == Weights(run_dir, sigma_rel):
        raise click.UsageError(
            "the guide is the network itself; give it another --guidance-sigma-rel, "
            "--guidance-run-dir or --guidance-t"
        )
    return Guide(weights, values["guidance"], values.get("interval"))
