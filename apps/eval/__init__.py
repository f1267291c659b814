"""Evaluation: suites over a checkpoint, benchmarks with receipts, and the report of a run; not training."""
