"""Benchmarks against other trainers. They use the public API only: `python -m bench dpo`."""
