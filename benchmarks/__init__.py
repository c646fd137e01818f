"""Benchmarks: each file answers one question; README.md holds the answers."""
