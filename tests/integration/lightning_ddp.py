"""Two processes train with Lightning's DDP; run as a script, it writes what each rank saw."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    import lightning_runs as runs
    from lightning.pytorch.callbacks import Callback

    from posthoc_ema.integrations.lightning import EMACallback

    class Report(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            average = ema.ema.average(0.1)
            sums = {name: float(value.double().sum()) for name, value in average.items()}
            seen = {"t": ema.ema.t, "sums": sums, "validated": len(pl_module.validated)}
            (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(seen))

    ema = EMACallback(snapshots=folder / "ema", every=4, validate_with=0.1)
    trainer = runs.make_trainer(folder, ema, Report(), strategy="ddp", devices=2)
    trainer.fit(runs.make_net(), runs.data(), runs.data(16))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
