"""Attention by TPU Pallas kernels, behind the gate `pallas_attention`. Only `kernels` and `operator` import jax."""
