"""Command line: look at the snapshots of a run, check them, and make averages of any length.

One file for each command; a new one is a file like the others and a name in ``COMMANDS``. No
framework is needed: weights are read and written as bytes and numbers.
"""

from __future__ import annotations

import click

from posthoc_ema.cli.convert import convert
from posthoc_ema.cli.error import error
from posthoc_ema.cli.importing import import_
from posthoc_ema.cli.listing import list_snapshots
from posthoc_ema.cli.output import TeachingGroup
from posthoc_ema.cli.plan import plan
from posthoc_ema.cli.plot import plot
from posthoc_ema.cli.prune import prune
from posthoc_ema.cli.reconstruct import reconstruct
from posthoc_ema.cli.verify import verify

COMMANDS = (plan, list_snapshots, verify, error, reconstruct, prune, convert, import_, plot)
"""In the order in which one meets them."""


@click.group(cls=TeachingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="posthoc-ema")
def main(debug: bool) -> None:
    """Choose the EMA length after training.

    A run that tracked a few averages with EMA(snapshots=FOLDER) left one file for each track
    and time. These commands look at such a folder and combine its files into an average of any
    length, without the training code and without PyTorch or JAX.

      posthoc-ema list run/ema                     what is there
      posthoc-ema error run/ema                    which lengths it supports
      posthoc-ema reconstruct run/ema --sigma-rel 0.05,0.07 --out averages/

    The EMA length, sigma_rel, is the width of the average as a fraction of training time, up to
    0.2887: the plain mean over the whole run.

    Exit status: 0 done; 1 the data says no (a damaged file, an error above --max-error);
    2 the command was misused.
    """


for command in COMMANDS:
    main.add_command(command)
