"""Command line of the reference model: each command imports what it needs when it runs."""

from __future__ import annotations

import click

from reference_model import (
    cli_ablate,
    cli_data,
    cli_evaluate,
    cli_evaluation,
    cli_generate,
    cli_sweep,
    cli_toy,
    cli_train,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """EDM2's diffusion network (config G), with the EMA length chosen after training.

    \b
    See what that is for (five minutes), on embedded handwritten digits:
      python -m reference_model demo --run-dir runs/demo

    \b
    Or step by step: train, look at samples, find the best EMA length:
      python -m reference_model train --preset digits --run-dir runs/digits
      python -m reference_model generate --run-dir runs/digits --sigma-rel 0.1 --out samples
      python -m reference_model sweep --run-dir runs/digits
    """  # noqa: D301 (click takes \\b for the character)


for _command in (
    cli_data.prepare,
    cli_train.train,
    cli_generate.generate,
    cli_evaluate.evaluate,
    cli_evaluate.statistics,
    cli_sweep.sweep,
    cli_ablate.ablate,
    cli_evaluation.report,
    cli_evaluation.demo,
    cli_train.flops,
    cli_toy.toy,
):
    main.add_command(_command)
