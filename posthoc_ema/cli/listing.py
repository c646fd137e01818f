"""``posthoc-ema list``: what is in a folder of snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from posthoc_ema.cli.options import folder_argument, json_option
from posthoc_ema.cli.output import (
    command,
    echo_json,
    exit_with,
    format_bytes,
    format_profile,
    table,
)
from posthoc_ema.errors import PosthocEMAError
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.snapshots import SnapshotStore


@command("list")
@folder_argument
@json_option
def list_snapshots(store: SnapshotStore, as_json: bool) -> None:
    """Show the snapshots in FOLDER.

    Reads the head of each file only, so it is quick however large they are. A file that cannot
    be used is named with its problem, and the exit status is 1.

    Example:
      posthoc-ema list run/ema
      posthoc-ema list run/ema --json | jq .summary
    """
    snapshots, problems = store.scan()
    complaints = folder_complaints(store, problems)
    if as_json:
        echo_json(
            {
                "folder": store.path,
                "snapshots": [_describe(snapshot) for snapshot in snapshots],
                "problems": complaints,
                "summary": _summary(snapshots),
            }
        )
    elif snapshots:
        rows = [
            (
                str(s.t),
                format_profile(s.profile),
                s.encoding,
                format_bytes(s.nbytes),
                s.run.unit,
                s.run.run_id,
                s.path.name,
            )
            for s in snapshots
        ]
        click.echo(table(("t", "track", "encoding", "size", "unit", "run", "file"), rows))
        click.echo("\n" + _summary_line(_summary(snapshots)))
    exit_with(complaints)


def folder_complaints(store: SnapshotStore, problems: Sequence[Exception]) -> list[str]:
    """What is wrong with the files, or, where each is right, with having them in one folder."""
    if problems:
        return [str(problem) for problem in problems]
    try:
        store.list()
    except PosthocEMAError as error:
        return [str(error)]
    return []


def _describe(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "file": snapshot.path.name,
        "t": snapshot.t,
        "unit": snapshot.run.unit,
        "run_id": snapshot.run.run_id,
        "framework": snapshot.run.framework,
        "profile": snapshot.profile,
        "encoding": snapshot.encoding,
        "bytes": snapshot.nbytes,
        "parameters": snapshot.statistics["count"],
    }


def _summary(snapshots: Sequence[Snapshot]) -> dict[str, Any] | None:
    if not snapshots:
        return None
    times = sorted({s.t for s in snapshots})
    last = snapshots[-1]
    return {
        "snapshots": len(snapshots),
        "bytes": sum(s.nbytes for s in snapshots),
        "times": len(times),
        "t_first": times[0],
        "t_last": times[-1],
        "unit": last.run.unit,
        "tracks": list(dict.fromkeys(s.profile for s in snapshots)),
        "parameters": last.statistics["count"],
        "tensors": len(last.averages),
    }


def _summary_line(summary: Any) -> str:
    tracks = ", ".join(format_profile(profile) for profile in summary["tracks"])
    return (
        "{snapshots} snapshots, {size}: {times} times from t={t_first} to t={t_last} {unit}, "
        "tracks {names}; {parameters:,} averaged parameters in {tensors:,} tensors"
    ).format(**summary, size=format_bytes(summary["bytes"]), names=tracks)
