"""Scripts that compute golden tables with mpmath: `PYTHONPATH=tests python -m precompute`.

Nothing here imports `posthoc_ema`: the tables are what the library is compared with.
"""
