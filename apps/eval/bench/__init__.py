"""Benchmarks: interleaved, behind a correctness gate, and written down as receipts."""
