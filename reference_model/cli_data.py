"""The command that makes training sets: prepare."""

from __future__ import annotations

from pathlib import Path

import click

from reference_model.cli_support import device_option, errors_as_messages, quiet_option


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--size",
    type=click.IntRange(min=1),
    help="Side of the square to resize and crop to; otherwise all images must be of one size.",
)
@click.option(
    "--grey",
    is_flag=True,
    help="Write grey images instead of colour; grey IDX files and arrays stay grey anyway.",
)
@click.option(
    "--vae",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of an autoencoder (a copy of stabilityai/sd-vae-ft-mse): write its latents.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Images at once in the autoencoder.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads; by default one a processor.")
@device_option
@quiet_option
def prepare(
    source: Path,
    dest: Path,
    size: int | None,
    grey: bool,
    vae: Path | None,
    batch_size: int,
    workers: int | None,
    device: str,
    quiet: bool,
) -> None:
    """Convert SOURCE into a training set DEST: squares of one size, or latents of them.

    SOURCE is a folder or ZIP of images of any size, at any depth; or IDX files (MNIST and its
    like), or NPZ or NPY arrays. The class of an image is what dataset.json says
    ({"labels": [["a.png", 0], ...]}), or else the sub-folder that it is in. What is transparent
    becomes white.

    DEST is a ZIP if its name ends in .zip, else a folder: PNG files and a dataset.json, as the
    public EDM tools write and read them.

    \b
    Photos in a folder for each class, as 64×64 pixels in colour:
      python -m reference_model prepare photos/ photos64.zip --size 64
      python -m reference_model train --preset edm2-img64-s --data photos64.zip \\
          --label-dim CLASSES --run-dir RUN

    \b
    The same as 512×512 pixels, in latents of 64×64×4 (needs the package diffusers):
      python -m reference_model prepare photos/ latents.zip --size 512 --vae sd-vae-ft-mse/
      python -m reference_model train --preset edm2-img512-s --data latents.zip \\
          --vae sd-vae-ft-mse/ --label-dim CLASSES --run-dir RUN

    As in the paper: halved while the shorter side is at least twice --size, then resized to it,
    then the middle is cut out. Interrupt at will: finished images are in DEST.partial, and the same
    command goes on from there. DEST appears when it is complete.
    """  # noqa: D301 (click takes \\b for the character)
    with errors_as_messages():
        from reference_model.prepare import prepare as run_prepare

        count = run_prepare(
            source,
            dest,
            size=size,
            grey=grey,
            vae=vae,
            batch_size=batch_size,
            workers=workers,
            device=device,
            progress=not quiet,
        )
    click.echo(f"Wrote {count:,} {'latents' if vae else 'images'} to {dest}")
