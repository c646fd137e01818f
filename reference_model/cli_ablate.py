"""The command of the paper's Table 1: ablate."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reference_model.charts import number, plus_minus
from reference_model.cli_protocol import protocol_options
from reference_model.cli_support import SigmaRels, errors_as_messages, json_option, quiet_option
from reference_model.ladder import HABITS, LADDER
from reference_model.presets import PRESETS
from reference_model.protocol import LENGTHS, Protocol

if TYPE_CHECKING:
    from reference_model.ablate import Variant

ALL = "all"
WHOLE = "G"
"""What ingredients are left out of."""


class Names(click.ParamType):  # type: ignore[type-arg]
    """Names with commas between."""

    name = "NAME,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the names."""
        return tuple(part.strip() for part in value.split(",") if part.strip())


@click.command()
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(list(PRESETS)),
    metavar="NAME",
    default="digits",
    show_default=True,
    help=f"Data and size: {', '.join(PRESETS)}.",
)
@click.option(
    "--configs",
    type=Names(),
    help=f"Configs to compare, of {', '.join(HABITS)}.  [default: {','.join(LADDER)}; with "
    "--leave-one-out: G]",
)
@click.option(
    "--leave-one-out",
    "left_out",
    type=Names(),
    is_flag=False,
    flag_value=ALL,
    help="Also G without one ingredient each: all of them, or --leave-one-out=pixel_norm,mp_sum.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Trainings of each; error bars over seeds need two or more.",
)
@click.option(
    "--total-nimg",
    type=click.IntRange(1),
    help="Length of training in images; stretches the preset's schedule.  [default: the preset's]",
)
@click.option("--data", help="Data set instead of the preset's, as `train --data` takes it.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Runs at a time, which share the cores.  [default: one for each core]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory of the ablation: a folder for each run, ablate.html and ablate.json.",
)
@click.option(
    "--sigma-rel",
    "sigma_rels",
    type=SigmaRels(),
    help="EMA lengths to measure; each variant's best is one of them.  "
    f"[default: {','.join(f'{s:g}' for s in LENGTHS)}]",
)
@click.option(
    "--fixed-sigma-rel",
    type=float,
    default=0.1,
    show_default=True,
    help="One length at which all are compared beside their own best.",
)
@protocol_options
@json_option
@quiet_option
def ablate(
    preset_name: str,
    configs: tuple[str, ...] | None,
    left_out: tuple[str, ...] | None,
    seeds: int,
    total_nimg: int | None,
    data: str | None,
    jobs: int | None,
    out: Path,
    sigma_rels: tuple[float, ...] | None,
    fixed_sigma_rel: float,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train the configs of the paper's ladder under the same conditions, and compare them.

    Every config is trained on the same data, seeds and number of images, with its own learning
    rate and batch size; EMA lengths are reconstructed from the snapshots of each, and each is
    compared at its own best length, as in the paper, and at a fixed one. The page shows what the
    wrong length costs each of them, how magnitudes drift, and where theory holds.

    \b
    The whole ladder on the embedded digits (an hour or two on two cores):
      ablate --out runs/ladder --seeds 2
    Two configs alone:
      ablate --out runs/ladder --configs A,G
    What does each ingredient of G do? All of them, or two:
      ablate --out runs/ingredients --leave-one-out
      ablate --out runs/ingredients --leave-one-out=pixel_norm,mp_sum
    A look in a minute; nothing can be concluded from it:
      ablate --out runs/tiny --preset digits-tiny --configs D,G --images 40 --num-steps 2

    Interrupt at will: finished runs are never done again, and others go on from their checkpoint.
    More seeds, configs or lengths later, in the same directory, cost only what is new. A run that
    fails is named with its log, and the others go on; the exit status is then 1.
    """  # noqa: D301 (click takes \\b for the character)
    with errors_as_messages():
        from reference_model.ablate import AblationPlan
        from reference_model.ablate import ablate as run_ablation
        from reference_model.ablate_pool import StoppedError
        from reference_model.ablate_report import REPORT_FILE, write_ablation

        plan = AblationPlan(
            preset_name,
            _variants(configs, left_out),
            tuple(range(seeds)),
            total_nimg,
            str(Path(data).resolve()) if data and Path(data).exists() else data,
            sigma_rels or LENGTHS,
            fixed_sigma_rel,
            Protocol(**{name: v for name, v in options.items() if v is not None}),
        )
        try:
            failures = run_ablation(plan, out, jobs=jobs, progress=not quiet)
        except StoppedError as stopped:
            raise click.ClickException(str(stopped)) from stopped
        results = write_ablation(plan, out, failures)
    if as_json:
        click.echo(json.dumps(results))
    else:
        for line in _table(results):
            click.echo(line)
        click.echo(f"Wrote {out / REPORT_FILE}")
    for failure in failures:
        click.echo(f"Error: {failure}", err=True)
    if failures:
        sys.exit(1)


def _variants(
    configs: tuple[str, ...] | None, left_out: tuple[str, ...] | None
) -> tuple[Variant, ...]:
    from reference_model.ablate import Variant, leave_one_out

    if configs is None:
        configs = tuple(LADDER) if left_out is None else ()
    chosen = [Variant(config) for config in configs]
    if left_out is not None:
        chosen += leave_one_out(WHOLE, None if left_out == (ALL,) else left_out)
    return tuple(dict.fromkeys(chosen))


def _table(results: Mapping[str, Any]) -> list[str]:
    """The page's first table, and its checks, for a terminal."""
    fixed = results["plan"]["fixed_sigma_rel"]
    lines = [f"{'':16} {'best σ_rel':>10}  {'distance':>16}  {f'at {fixed:g}':>16}  cost of that"]
    for v in results["variants"]:
        best, at = v["best"], v["fixed"]
        scores = [plus_minus(s["mean"], s["error"] or 0.0) for s in (best, at)]
        edge = "*" if best["at_edge"] else " "
        lines.append(
            f"{v['name']:16} {best['sigma_rel']:>9g}{edge}  {scores[0]:>16}  {scores[1]:>16}  "
            f"{number(at['cost'])} ×"
        )
    if any(v["best"]["at_edge"] for v in results["variants"]):
        lines.append("* the shortest or longest length measured: give more by --sigma-rel")
    for check in results["checks"]:
        sign = "as expected" if check["holds"] else "NOT as expected"
        lines.append(
            f"{sign}: {check['statement']}: {check['seen']} (expected: {check['expected']})"
        )
    return lines
