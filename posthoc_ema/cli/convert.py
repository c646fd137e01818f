"""``posthoc-ema convert``: the same snapshots in fewer bytes, or in more."""

from __future__ import annotations

import click

from posthoc_ema.cli.options import folder_argument, json_option, out_folder_type
from posthoc_ema.cli.output import command, echo_json, format_bytes
from posthoc_ema.convert import convert as convert_snapshots
from posthoc_ema.encoding import ENCODINGS
from posthoc_ema.places import Place
from posthoc_ema.snapshots import SnapshotStore


@command("convert")
@folder_argument
@click.argument("out", type=out_folder_type)
@click.option(
    "--encoding",
    required=True,
    type=click.Choice(list(ENCODINGS)),
    help="float32 is exact; float16 and bfloat16 take half of that; delta16, delta8, "
    "delta6 and delta4 store what cannot be predicted from earlier snapshots, in about a half, a "
    "quarter, a sixth and a seventh.",
)
@json_option
def convert(store: SnapshotStore, out: Place, encoding: str, as_json: bool) -> None:
    """Write the snapshots in FOLDER to OUT in another encoding.

    FOLDER is left as it is. After an interruption the same command goes on where it stopped.
    Rounding is never undone: float32 made from float16 is as coarse, and says so in its
    predicted errors.

    Example:
      posthoc-ema convert run/ema run/ema-small --encoding delta8
      posthoc-ema error run/ema-small
    """
    before = sum(s.nbytes for s in store.list())
    written = convert_snapshots(store, out, encoding)
    after = sum(s.nbytes for s in written)
    if as_json:
        echo_json(
            {
                "folder": out,
                "encoding": encoding,
                "files": [s.path.name for s in written],
                "bytes_before": before,
                "bytes": after,
            }
        )
        return
    click.echo(
        f"{len(written)} snapshots in {out}, {format_bytes(after)} "
        f"({format_bytes(before)} in {store.path})"
    )
