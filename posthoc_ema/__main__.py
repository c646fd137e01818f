"""``python -m posthoc_ema``: the same as the command ``posthoc-ema``."""

from posthoc_ema.cli import main

if __name__ == "__main__":
    main(prog_name="posthoc-ema")
