"""Commands that take a network's config, one option for each field: train and flops."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click

from reference_model.cli_support import (
    device_option,
    errors_as_messages,
    json_option,
    quiet_option,
    run_dir_option,
    set_threads,
    threads_option,
)
from reference_model.configs import DIGITS, PARALLEL, NetworkConfig, TrainConfig
from reference_model.ladder import leave_out, with_config
from reference_model.presets import PRESETS, preset


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


def given_fields(overrides: dict[str, Any]) -> dict[str, Any]:
    """Values of the fields for which an option was given."""
    return {k: None if v is ConfigNone else v for k, v in overrides.items() if v is not None}


def with_overrides(config: TrainConfig, overrides: dict[str, Any]) -> TrainConfig:
    """Replace the fields for which an option was given, those of the network included.

    Another rung of the ladder than the config's replaces all habits in which they differ.
    """
    given = given_fields(overrides)
    # A rung of the ladder brings its own habits; what is given explicitly comes on top.
    config = with_config(config, given.pop("config", config.network.config))
    config = leave_out(config, given.pop("leave_out", config.network.leave_out))
    for name in ("data", "vae"):
        value = given.get(name)
        if value and value != DIGITS and Path(value).exists():
            # Absolute, so that a run that is continued from another folder finds it again.
            given[name] = str(Path(value).resolve())
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


@click.command()
@preset_option
@run_dir_option
@device_option
@threads_option
@click.option(
    "--micro-batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Images that one process takes through the network at once, to save memory; gradients "
    "add up over a step. Not given: all of its share of the batch.",
)
@click.option(
    "--parallel",
    type=click.Choice(PARALLEL),
    default="ddp",
    show_default=True,
    help="How the processes of torchrun share the model: a copy in each, or a shard in each, for "
    "models that are too large for one GPU.",
)
@click.option(
    "--tensorboard", is_flag=True, help="Write statistics for TensorBoard too, in the run's folder."
)
@quiet_option
@config_options(NetworkConfig, TrainConfig)
def train(
    preset_name: str | None,
    run_dir: Path,
    device: str,
    threads: int | None,
    micro_batch: int | None,
    parallel: str,
    tensorboard: bool,
    quiet: bool,
    **overrides: Any,
) -> None:
    """Train a network, or continue a run that was stopped.

    A new run needs --preset; every other option replaces one value of it, but for --config,
    which brings the whole set of habits of that rung of the paper's ladder. --leave-out builds a
    config without some of its ingredients, as in an ablation. To continue a run,
    give its --run-dir alone: it remembers its options, and ends with the same weights as if it
    had never stopped. SIGTERM and Ctrl-C save before they stop it. Where the data has moved, give
    --data once: it is checked to be the same.

    \b
    On many GPUs, and on many machines that share the run directory:
      torchrun --nproc-per-node 8 -m reference_model train --device cuda ...
      torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
        -m reference_model train --device cuda ...

    --micro-batch, --parallel, --device and the number of processes are no part of what the run
    is: they may change whenever it continues, and the weights stay the same up to rounding.

    The run directory receives config.json, data.json, starts.jsonl, stats.jsonl, a checkpoint,
    and EMA snapshots under ema/ that every posthoc-ema command understands.
    """  # noqa: D301 (click takes \\b for the character)
    from reference_model.checkpoint import CONFIG_FILE, load_config
    from reference_model.distributed import OtherProcessError
    from reference_model.train import train as run_training

    set_threads(threads)
    try:
        with errors_as_messages():
            if preset_name is not None:
                config = preset(preset_name)
            elif (run_dir / CONFIG_FILE).exists():
                config = load_config(run_dir)
            else:
                raise click.UsageError(f"{run_dir} holds no run yet; start one with --preset")
            config = with_overrides(config, overrides)
            nimg = run_training(
                config,
                run_dir,
                progress=not quiet,
                device=device,
                micro_batch=micro_batch,
                parallel=parallel,
                tensorboard=tensorboard,
            )
    except OtherProcessError:
        sys.exit(1)  # the process that failed has said why
    if int(os.environ.get("RANK", 0)) > 0:
        return
    done = nimg >= config.total_nimg
    click.echo(
        f"{'Finished' if done else 'Stopped'} after {nimg:,} of {config.total_nimg:,} images."
        + ("" if done else f" Continue with: python -m reference_model train --run-dir {run_dir}")
    )


@click.command()
@preset_option
@json_option
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
            config = NetworkConfig(**given_fields(overrides))
        costs = count(config)
    click.echo(report(config, costs, as_json=as_json))
