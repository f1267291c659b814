"""Hopper kernels of the MIMO scan in TileLang: one source runs on the CPU for numerics and compiles for sm_90a."""
