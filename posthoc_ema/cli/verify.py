"""``posthoc-ema verify``: is every byte as it was written."""

from __future__ import annotations

import click

from posthoc_ema.cli.listing import folder_complaints
from posthoc_ema.cli.options import folder_argument, json_option
from posthoc_ema.cli.output import bytes_bar, command, echo_json, exit_with, format_bytes
from posthoc_ema.errors import PosthocEMAError
from posthoc_ema.snapshots import SnapshotStore


@command("verify")
@folder_argument
@json_option
def verify(store: SnapshotStore, as_json: bool) -> None:
    """Read every byte in FOLDER and compare with the digests.

    Finds what list cannot see: bytes that changed after they were written, by a failing disk or
    an interrupted copy. All files are checked, also after a bad one; the exit status is 1 if
    there is any.

    Example:
      posthoc-ema verify run/ema && rsync -a run/ema backup:
    """
    snapshots, problems = store.scan()
    opened = [s for snapshot in snapshots for s in (snapshot, snapshot.base) if s is not None]
    total = sum(entry.nbytes for s in opened for entry in s.entries.values())
    found: dict[str, str | None] = {}
    with bytes_bar("verify", total) as bar:
        for snapshot in snapshots:
            try:
                snapshot.verify(bar.update)
                found[snapshot.path.name] = None
            except PosthocEMAError as error:
                found[snapshot.path.name] = str(error)
    damaged = [problem for problem in found.values() if problem is not None]
    complaints = [*damaged, *folder_complaints(store, problems)]
    if as_json:
        files = [{"file": file, "ok": not bad, "problem": bad} for file, bad in found.items()]
        echo_json(
            {
                "folder": store.path,
                "ok": not complaints,
                "files": files,
                "problems": complaints,
                "bytes": total,
            }
        )
    else:
        for file, bad in found.items():
            click.echo(f"{'BAD' if bad else 'ok '}  {file}")
        click.echo(
            f"\n{len(found) - len(damaged)} of {len(found) + len(problems)} files intact, "
            f"{format_bytes(total)} read"
        )
    exit_with(complaints)
