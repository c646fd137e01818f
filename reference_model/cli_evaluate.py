"""Commands that measure images: evaluate, and statistics for what takes long or is shared."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reference_model.cli_generate import (
    PART,
    as_guide,
    guidance_options,
    guides_wanted,
    sampler_options,
)
from reference_model.cli_protocol import chosen_protocol, protocol_options
from reference_model.cli_support import (
    SigmaRels,
    device_option,
    errors_as_messages,
    json_option,
    quiet_option,
    run_dir_option,
    set_threads,
    threads_option,
)
from reference_model.protocol import Protocol
from reference_model.sampler_config import SamplerConfig

if TYPE_CHECKING:
    from reference_model.judge import Score


@click.command()
@run_dir_option
@click.option(
    "--sigma-rel",
    "sigma_rels",
    type=SigmaRels(),
    help="EMA lengths, as fractions of training time, such as 0.05,0.1 or 0.01,0.02,...,0.1.",
)
@click.option("--raw", is_flag=True, help="Measure the raw training weights.")
@click.option(
    "--from",
    "sets",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    help="Measure images that are there already instead: a folder of `generate`, or a file of "
    "`statistics`. Repeatable: each is one repeat.",
)
@protocol_options
@guidance_options
@sampler_options(without=("num_steps",))
@device_option
@threads_option
@json_option
@quiet_option
def evaluate(
    run_dir: Path,
    sigma_rels: tuple[float, ...] | None,
    raw: bool,
    sets: tuple[Path, ...],
    guidance: float | None,
    more_guides: tuple[dict[str, Any], ...],
    device: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure images of EMA lengths, of the raw weights, or of folders.

    Prints the Fréchet distance between generated and real images (lower is better; compare only
    distances of equally many images), precision and recall, and on demand the loss on held-out
    images. Options not given are those of the run's sweep, if there was one.

    \b
    Several EMA lengths and the raw weights, from the same noise:
      evaluate --run-dir runs/digits --sigma-rel 0.03,0.1 --raw
    With guidance, as `generate` takes it:
      evaluate ... --sigma-rel 0.1 --guidance 2 --guidance-sigma-rel 0.25
    FID and FD-DINOv2, with weights that you have, against all training images:
      evaluate ... --features inception:inception-2015-12-05.pt --reference train --images 50000
      evaluate ... --features dinov2:dinov2-large --reference train --images 50000
    What any number of processes generated:
      torchrun --nproc-per-node gpu -m reference_model generate ... --out samples
      evaluate --run-dir runs/digits --from samples
    """  # noqa: D301 (click takes \\b for the character)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise click.UsageError(
            "evaluate runs in one process; let torchrun `generate`, and measure that by --from"
        )
    chosen = [*([None] if raw else []), *(sigma_rels or ())]
    if bool(chosen) == bool(sets):
        raise click.UsageError("give --sigma-rel, such as --sigma-rel 0.1, or --raw, or --from")
    wanted_guides = guides_wanted(guidance, more_guides, options)
    of_protocol = {spec.name: options.pop(spec.name) for spec in fields(Protocol)}
    if sets:
        _refuse_sampling(of_protocol, bool(wanted_guides))
    set_threads(threads)
    with errors_as_messages():
        from reference_model.averages import Weights
        from reference_model.evaluate import evaluate as run_evaluation
        from reference_model.evaluate import evaluate_images

        protocol = chosen_protocol(run_dir, of_protocol)
        if sets:
            score = evaluate_images(run_dir, sets, protocol, device=device, progress=not quiet)
            scores = {", ".join(map(str, sets)): score}
        else:
            measured = run_evaluation(
                run_dir,
                [Weights(run_dir, sigma_rel) for sigma_rel in chosen],
                protocol,
                guides=[[as_guide(g, run_dir, s) for g in wanted_guides] for s in chosen],
                sampler=SamplerConfig(**options),
                device=device,
                progress=not quiet,
            )
            names = ["raw" if s is None else f"{s:g}" for s in chosen]
            scores = dict(zip(names, measured, strict=True))
    if as_json:
        keys: list[dict[str, Any]] = [{"sigma_rel": s} for s in chosen]
        if sets:
            keys = [{"images": [str(path) for path in sets]}]
        rows = [{**k, **_as_dict(m)} for k, m in zip(keys, scores.values(), strict=True)]
        click.echo(json.dumps({"protocol": asdict(protocol), "measurements": rows}))
    else:
        _print_table(scores, "images" if sets else "sigma_rel")


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True,
              help="NPZ file to write.")  # fmt: skip
@click.option("--features", help="inception:FILE, dinov2:FOLDER or torchscript:FILE.")
@click.option("--part", type=PART, help="Only part I of N (1/N to N/N), to be merged later.")
@device_option
@threads_option
@quiet_option
def statistics(
    sources: tuple[Path, ...],
    out: Path,
    features: str | None,
    part: tuple[int, int] | None,
    device: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """Describe images by a feature network once, to compare and share.

    SOURCES are folders of `generate`, data sets, and files that this command wrote; all of them
    are merged. The result holds mean and covariance of the features in float64, how many images
    they come from, a sample of features for precision and recall, and a digest of the network.

    \b
    Real images, to compare with:
      statistics imagenet.zip --features dinov2:dinov2-large --out real.npz
      evaluate --run-dir RUN --sigma-rel 0.1 --features dinov2:dinov2-large --reference real.npz
    In parts, on as many machines, and then merged:
      statistics samples --features dinov2:dinov2-large --part 1/2 --out part1.npz
      statistics part1.npz part2.npz --out all.npz
      evaluate --run-dir RUN --from all.npz --features dinov2:dinov2-large --reference real.npz
    """  # noqa: D301 (click takes \\b for the character)
    set_threads(threads)
    with errors_as_messages():
        from reference_model.evaluate import gather_statistics

        made = gather_statistics(
            sources, features, part=part or (1, 1), device=device, progress=not quiet
        )
        made.save(out)
    click.echo(
        f"Wrote {out}: {made.statistics.dim} {made.network} features of {len(made):,} images"
    )


def _refuse_sampling(of_protocol: dict[str, Any], guided: bool) -> None:
    """Refuse options that say how to generate where nothing is generated."""
    kept = ("features", "reference")
    given = [name for name, value in of_protocol.items() if value is not None and name not in kept]
    if given or guided:
        names = [f"--{name.replace('_', '-')}" for name in given] + ["--guidance"] * guided
        raise click.UsageError(
            f"--from measures images that are there already; {', '.join(names)} cannot be applied"
        )


def _as_dict(score: Score) -> dict[str, Any]:
    numbers = {"distance": score.distance, "standard_error": _number(score.error)}
    return {**numbers, **asdict(score)}


def _print_table(scores: dict[str, Score], title: str) -> None:
    """One line for each set of weights: means over repeats, and the error of the distance."""
    width = max(len(title), *map(len, scores))
    more = next(iter(scores.values())).more
    head = f"{title:>{width}}  {'distance':>9}  {'std error':>9}"
    click.echo(head + "".join(f"  {name:>13}" for name in (*more, "as intended")))
    for name, score in scores.items():
        cells = [f"{_mean(values):13.4f}" for values in score.more.values()]
        read = f"{100 * _mean(score.agreement):11.1f} %" if score.agreement else f"{'-':>13}"
        error = f"{score.error:9.4f}" if score.error == score.error else f"{'-':>9}"
        click.echo("  ".join([f"{name:>{width}}", f"{score.distance:9.4f}", error, *cells, read]))


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if value == value else None
