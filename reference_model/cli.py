"""Command line of the reference model: each command imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click

from reference_model import cli_evaluation
from reference_model.cli_support import errors_as_messages, run_dir_option
from reference_model.configs import NetworkConfig, TrainConfig
from reference_model.presets import PRESETS, preset

threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads; one is as fast as two for networks as small as the digits'.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """EDM2's diffusion network (config G), with the EMA length chosen after training.

    \b
    See what that is for (five minutes), on embedded handwritten digits:
      python -m reference_model demo --run-dir runs/demo

    \b
    Or step by step: train, look at samples, find the best EMA length:
      python -m reference_model train --preset digits --run-dir runs/digits
      python -m reference_model generate --run-dir runs/digits --sigma-rel 0.1 --out samples
      python -m reference_model sweep --run-dir runs/digits
    """  # noqa: D301 (click takes \\b for the character)


class ConfigValue(click.ParamType):  # type: ignore[type-arg]
    """Text for a config field: a number, a word, `none`, or numbers with commas between.

    Args:
        hint: The field's type.
    """

    def __init__(self, hint: Any) -> None:
        options = get_args(hint)
        self.optional = type(None) in options
        self.many = get_origin(hint) is tuple
        self.kind = options[0] if options else hint
        self.name = self.kind.__name__ + (",..." if self.many else "|none" * self.optional)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return what the text stands for, or fail saying what it should look like."""
        if self.optional and value == "none":
            return ConfigNone
        try:
            if self.many:
                return tuple(self.kind(part) for part in value.split(",") if part)
            return self.kind(value)
        except ValueError:
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)


class ConfigNone:
    """Stands for an explicit `none`, since click's None is an option not given."""


def config_options(*kinds: Any) -> Callable[..., Any]:
    """Give a command one option for each field of these configs."""

    def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
        for kind in kinds:
            hints = get_type_hints(kind)
            for spec in reversed([f for f in fields(kind) if f.name != "network"]):
                name = f"--{spec.name.replace('_', '-')}"
                convert = ConfigValue(hints[spec.name])
                option = click.option(name, spec.name, type=convert, help=spec.metadata["help"])
                command = option(command)
        return command

    return with_options


def with_overrides(config: TrainConfig, overrides: dict[str, Any]) -> TrainConfig:
    """Replace the fields for which an option was given, those of the network included."""
    given = {k: None if v is ConfigNone else v for k, v in overrides.items() if v is not None}
    network_names = {f.name for f in fields(NetworkConfig)}
    of_network: dict[str, Any] = {k: v for k, v in given.items() if k in network_names}
    of_training: dict[str, Any] = {k: v for k, v in given.items() if k not in network_names}
    return replace(config, network=replace(config.network, **of_network), **of_training)


preset_option = click.option(
    "--preset",
    "preset_name",
    type=click.Choice(list(PRESETS)),
    metavar="NAME",
    help=f"Where options not given come from: {', '.join(PRESETS)}.",
)


@main.command()
@preset_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@config_options(NetworkConfig)
def flops(preset_name: str | None, as_json: bool, **overrides: Any) -> None:
    """Count the operations of one evaluation for one image, per layer and in total.

    \b
    Of one of the paper's networks, of a variant of one, or of one of your own:
      python -m reference_model flops --preset edm2-img512-s
      python -m reference_model flops --preset edm2-img512-s --attn-resolutions 8
      python -m reference_model flops --img-resolution 28 --img-channels 1 --channel-mult 1,2,2

    Counted as in the paper: a multiplication with its addition is one operation, an elementwise
    operation one, SiLU and softmax three for each element, and weights are normalised for the one
    image. Sampling with N Heun steps takes 2N - 1 evaluations for each image, a training step
    three times an evaluation.
    """  # noqa: D301 (click takes \\b for the character)
    from reference_model.flops import count, report

    with errors_as_messages():
        if preset_name is not None:
            config = with_overrides(preset(preset_name), overrides).network
        elif overrides["img_resolution"] is None or overrides["img_channels"] is None:
            raise click.UsageError("give --preset, or both --img-resolution and --img-channels")
        else:
            given = {k: v for k, v in overrides.items() if v is not None}
            given = {k: None if v is ConfigNone else v for k, v in given.items()}
            config = NetworkConfig(**given)
        costs = count(config)
    click.echo(report(config, costs, as_json=as_json))


@main.command()
@preset_option
@run_dir_option
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@threads_option
@click.option("--quiet", is_flag=True, help="No progress bar.")
@config_options(NetworkConfig, TrainConfig)
def train(
    preset_name: str | None,
    run_dir: Path,
    device: str,
    threads: int | None,
    quiet: bool,
    **overrides: Any,
) -> None:
    """Train a network, or continue a run that was stopped.

    A new run needs --preset; every other option replaces one value of it. To continue a run,
    give its --run-dir alone: it remembers its options, and ends with the same weights as if it
    had never stopped. SIGTERM and Ctrl-C save before they stop it.

    The run directory receives config.json, stats.jsonl, a checkpoint, and EMA snapshots under
    ema/ that every posthoc-ema command understands.
    """
    from reference_model.checkpoint import CONFIG_FILE, load_config
    from reference_model.train import train as run_training

    set_threads(threads)
    with errors_as_messages():
        if preset_name is not None:
            config = preset(preset_name)
        elif (run_dir / CONFIG_FILE).exists():
            config = load_config(run_dir)
        else:
            raise click.UsageError(f"{run_dir} holds no run yet; start one with --preset")
        config = with_overrides(config, overrides)
        nimg = run_training(config, run_dir, progress=not quiet, device=device)
    done = nimg >= config.total_nimg
    click.echo(
        f"{'Finished' if done else 'Stopped'} after {nimg:,} of {config.total_nimg:,} images."
        + ("" if done else f" Continue with: python -m reference_model train --run-dir {run_dir}")
    )


@main.command()
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
@click.option("--classes", help="Classes, taken in turn, as in 0-9; otherwise random.")
@click.option("--num-steps", default=32, show_default=True, help="Steps of the solver.")
@click.option("--batch-size", default=64, show_default=True, help="Does not change the images.")
@threads_option
@click.option("--scale", type=click.IntRange(min=1), help="Magnification of the pixels.")
def generate(
    run_dir: Path,
    out: Path,
    sigma_rel: float | None,
    raw: bool,
    seeds: str,
    classes: str | None,
    num_steps: int,
    batch_size: int,
    threads: int | None,
    scale: int | None,
) -> None:
    """Generate images from a run, at any EMA length.

    The weights are reconstructed from the run's snapshots, so --sigma-rel need not be one of
    the lengths that training tracked. A seed gives the same image whatever the others are.
    """
    from reference_model.generate import generate as run_generate

    if (sigma_rel is None) == (not raw):
        raise click.UsageError("give either --sigma-rel, such as --sigma-rel 0.1, or --raw")
    set_threads(threads)
    with errors_as_messages():
        grid = run_generate(
            run_dir,
            out,
            parse_numbers(seeds, "seeds"),
            sigma_rel=sigma_rel,
            classes=None if classes is None else parse_numbers(classes, "classes"),
            scale=scale,
            num_steps=num_steps,
            batch_size=batch_size,
        )
    click.echo(f"Wrote {grid}")


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


for _command in (
    cli_evaluation.evaluate,
    cli_evaluation.sweep,
    cli_evaluation.report,
    cli_evaluation.demo,
):
    main.add_command(_command)
