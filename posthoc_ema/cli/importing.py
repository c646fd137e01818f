"""``posthoc-ema import``: other people's snapshots into a folder of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from posthoc_ema.cli.options import (
    Numbers,
    json_option,
    numbers_type,
    out_folder_type,
    parsed_profile,
    sigma_rel_option,
)
from posthoc_ema.cli.output import (
    command,
    echo_json,
    format_bytes,
    format_error,
    format_profile,
    note,
    table,
)
from posthoc_ema.encoding import ENCODINGS
from posthoc_ema.importing.recognise import KINDS
from posthoc_ema.importing.write import Import, import_snapshots
from posthoc_ema.places import Place
from posthoc_ema.profiles import Profile
from posthoc_ema.reconstruct import reconstruct
from posthoc_ema.snapshots import SnapshotStore

_SHOWN = 6


@command("import")
@click.argument("source", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=out_folder_type)
@click.option("--kind", type=click.Choice(KINDS), help="What SOURCE is, if it is not recognised.")
@sigma_rel_option(
    help="EMA lengths of the tracks in SOURCE, where files do not say them, in the order of the "
    "tracks' numbers: 0.05,0.28."
)
@click.option(
    "--profile",
    type=parsed_profile,
    help="How plain checkpoints average: raw (weights as they were trained; raw:step=256 where a "
    "step is 256 units), exponential:beta=0.9999, power:sigma_rel=0.05, uniform:window=1000.",
)
@click.option(
    "--csv",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A table of plain checkpoints: columns file (relative to SOURCE), t, profile.",
)
@click.option(
    "--update-every",
    type=click.IntRange(min=1),
    default=1,
    help="Steps between updates of ema-pytorch's averages, whose lengths it changes.",
)
@click.option("--unit", help="Name of the unit of time, for plain checkpoints; default: steps.")
@click.option(
    "--key", help="Where in each file the weights are, as state_dict, if there are several sets."
)
@click.option(
    "--subfolder",
    help="Which folder or file in each checkpoint, as unet_ema, if there are several sets.",
)
@click.option(
    "--encoding",
    type=click.Choice(list(ENCODINGS)),
    default="float32",
    show_default=True,
    help="How to store them; float16 loses nothing of files in half precision.",
)
@click.option(
    "--allow",
    multiple=True,
    metavar="MODULE.NAME",
    help="A name of code that pickles may hold all the same. It is read as data, too.",
)
@click.option("--dry-run", is_flag=True, help="Only say what was recognised; write nothing.")
@click.option(
    "--reconstruct",
    "wanted",
    type=numbers_type,
    help="Make averages of these lengths at once; they go to --averages.",
)
@click.option(
    "--averages",
    type=out_folder_type,
    help="Folder for them, where files of the same names are replaced; default: OUT-averages.",
)
@json_option
def import_(
    source: tuple[Path, ...],
    out: Place,
    wanted: Numbers | None,
    averages: Place | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Read what other programs saved in SOURCE into OUT.

    Nothing in the files is executed: pickles are read as data, and a file that refers to any code
    but that of tensors and modules is refused. SOURCE is left as it is. It may hold

      network-snapshot-*.pkl    pickles of the official EDM2 code
      {track}.{step}.pt         ema-pytorch, pytorch-posthoc-ema: with --sigma-rel
      plain checkpoints         .safetensors, .pt, .ckpt, .pth.tar, folders of transformers, PEFT,
                                diffusers, accelerate, with their step in their names: with
                                --profile; or listed in a CSV, which may be SOURCE itself

    SOURCE may be several files. OUT is then a folder as EMA(snapshots=OUT) writes it, for all other
    commands. The same command goes on after an interruption, and takes in what was added.

    Example:
      posthoc-ema import raw-snapshots/ run/ema --reconstruct 0.13
      posthoc-ema import post-hoc-ema-checkpoints/ run/ema --sigma-rel 0.05,0.28
      posthoc-ema import checkpoints/ run/ema --profile raw --dry-run
      posthoc-ema import sd-run/ run/ema --subfolder unet_ema --profile exponential:beta=0.9999
      posthoc-ema import ema_0.9999_*.pt run/ema --profile exponential:beta=0.9999
    """
    done = import_snapshots(
        source if len(source) > 1 else source[0], out, dry_run=dry_run, **options
    )
    results = []
    if wanted and not dry_run:
        folder = averages or out.with_name(f"{out.name}-averages")
        results = reconstruct(SnapshotStore(out), wanted, out=folder, framework="numpy")
    if as_json:
        echo_json(_describe(done, out, dry_run, results))
        return
    click.echo(_summary(done))
    for remark in done.remarks:
        note(f"Note: {remark}")
    if dry_run:
        click.echo("nothing was written")
        return
    size = format_bytes(sum(s.nbytes for s in done.snapshots))
    there = f", {done.skipped} of them imported before" if done.skipped else ""
    click.echo(f"{len(done.snapshots)} snapshots in {out}, {size}{there}")
    if results:
        rows = [(str(r.files[0]), format_error(r.predicted_error)) for r in results]
        click.echo(table(("file", "predicted error"), rows))


def _summary(done: Import) -> str:
    """What was recognised; of many files the first and the last."""
    rows = [(str(t), format_profile(profile), path.name) for path, t, profile in done.files]
    if len(rows) > 2 * _SHOWN:
        rows = [*rows[:_SHOWN], ("...", "", ""), *rows[-_SHOWN:]]
    files = f"{done.kind}: {len(done.files)} snapshots, t in {done.unit}"
    return f"{files}\n\n{table(('t', 'average', 'file'), rows)}\n"


def _describe(done: Import, out: Place, dry_run: bool, results: list[Any]) -> dict[str, Any]:
    described: list[tuple[Path, float, Profile]] = list(done.files)
    return {
        "folder": out,
        "kind": done.kind,
        "unit": done.unit,
        "files": [{"file": f, "t": t, "profile": p} for f, t, p in described],
        "remarks": done.remarks,
        "dry_run": dry_run,
        "snapshots": [s.path.name for s in done.snapshots],
        "skipped": done.skipped,
        "averages": [
            {"file": r.files[0], "profile": r.profile, "predicted_error": r.predicted_error}
            for r in results
        ],
    }
