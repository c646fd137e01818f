"""posthoc_ema: choose the EMA length after training."""
