"""``posthoc-ema reconstruct``: averages of any length, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from posthoc_ema.cli.options import (
    Numbers,
    folder_argument,
    json_option,
    method_option,
    out_option,
    part_type,
    profile_option,
    sigma_rel_option,
    time_option,
    wanted_profiles,
)
from posthoc_ema.cli.output import Misuse, command, echo_json, format_error, note, table
from posthoc_ema.export import is_torch_file
from posthoc_ema.places import Place
from posthoc_ema.profiles import Profile
from posthoc_ema.reconstruct import Reconstruction
from posthoc_ema.reconstruct import reconstruct as reconstruct_averages
from posthoc_ema.snapshots import SnapshotStore


@command("reconstruct")
@folder_argument
@sigma_rel_option()
@profile_option
@out_option(
    "A folder, where each result gets a file named after its length; or, for a single result, "
    "a file name.safetensors, or name.pt for torch.load."
)
@time_option
@method_option
@click.option(
    "--names",
    multiple=True,
    metavar="PATTERN",
    help="Only averaged tensors whose names match, such as 'decoder.*', and no buffers. May be "
    "given several times.",
)
@click.option(
    "--slack",
    type=click.FloatRange(0),
    metavar="SHARE",
    help="By how much the predicted error may exceed the least, so that fewer snapshots are read, "
    "often a third or less; 0 reads and checks all.  [default: 0.005 above 256 MB, else 0]",
)
@click.option(
    "--part",
    type=part_type,
    metavar="I/N",
    help="Make the I-th of N parts only, for N processes or machines that share the --out folder: "
    "'2/8', or 'auto' under torchrun (RANK and WORLD_SIZE). The last to end writes the index.",
)
@click.option(
    "--like",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a Hugging Face model: --out becomes such a folder, with its configuration and "
    "tokenizer, and the result as its weights.",
)
@click.option("--overwrite", is_flag=True, help="Replace results that exist already.")
@json_option
def reconstruct(
    store: SnapshotStore,
    sigma_rel: Numbers | None,
    profiles: tuple[Profile, ...],
    out: Place,
    t: float | None,
    method: str,
    names: tuple[str, ...],
    slack: float | None,
    part: tuple[int, int] | None,
    like: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make averages of any length, as safetensors files.

    All results come from one pass over the snapshots in FOLDER, in little memory whatever the
    size of the model; large results are split into shards with an index. Any tool that reads
    safetensors loads them as a state dict.

    Example:
      posthoc-ema reconstruct run/ema --sigma-rel 0.05,0.07 --out averages/
      posthoc-ema reconstruct run/ema --sigma-rel 0.07 --t 50000 --out at-50000.safetensors
      posthoc-ema reconstruct run/ema --sigma-rel 0.05 --out averages/ --part 2/8
      posthoc-ema reconstruct run/ema --profile uniform:window=0.2 --out averages/
      posthoc-ema reconstruct run/ema --sigma-rel 0.07 --like model/ --out model-averaged/
    """
    targets = wanted_profiles(sigma_rel, profiles)
    if not targets:
        raise click.UsageError("say which average: --sigma-rel 0.05, or --profile ...")
    is_file = out.name.endswith(".safetensors") or is_torch_file(out)
    if (out.parent if is_file else out).resolve() == store.path.resolve():
        raise click.UsageError(f"--out {out} lies in the snapshot folder; give another folder")
    # In a folder even a single result is named after its length, which a sequence gives.
    one_file = (is_file or like is not None) and len(targets) == 1
    try:
        results: Any = reconstruct_averages(
            store,
            target=targets[0] if one_file else targets,
            t=t,
            method=method,
            out=out,
            overwrite=overwrite,
            framework="numpy",
            names=names or None,
            part=part,
            like=like,
            slack=slack,
        )
    except FileExistsError as error:
        raise Misuse(f"{error}, or add --overwrite to replace it") from error
    results = [results] if one_file else results
    if as_json:
        echo_json([_describe(result) for result in results])
    else:
        header = ("file", "predicted error", "profile error", "L1 norm", "L2 norm")
        click.echo(table(header, [_row(result) for result in results]))
    counting = np.stack([result.coefficients != 0 for result in results])
    used, of = int(counting.any(0).sum()), counting.shape[1]
    if used < of and (counting.sum(1) > 1).any():
        note(f"Note: {used} of {of} snapshots make up what all would give, within the slack.")
    for remark in results[0].diagnostics["remarks"]:
        note(f"Note: {remark}")


def _row(result: Reconstruction) -> tuple[str, ...]:
    more = len(result.files) - 1
    return (
        f"{result.files[0]} (and {more} more shards)" if more else str(result.files[0]),
        format_error(result.predicted_error),
        format_error(result.diagnostics["profile_error"]),
        f"{result.diagnostics['l1_norm']:.3f}",
        f"{result.diagnostics['l2_norm']:.3f}",
    )


def _describe(result: Reconstruction) -> dict[str, Any]:
    diagnostics = ("profile_error", "condition_number", "l1_norm", "l2_norm", "remarks")
    return {
        "files": [str(path) for path in result.files],
        "t": result.t,
        "profile": result.profile,
        "predicted_error": result.predicted_error,
        **{key: result.diagnostics[key] for key in diagnostics},
        "coefficients": [
            {"t": t, "profile": profile, "coefficient": x}
            for (t, profile), x in zip(result.inputs, result.coefficients, strict=True)
        ],
    }
