"""Run the command line: `python -m reference_model`."""

import os

# Before torch loads: threads that spin while they wait make a small network tens of times
# slower as soon as anything else uses the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from reference_model.cli import main

if __name__ == "__main__":
    main(prog_name="python -m reference_model")
