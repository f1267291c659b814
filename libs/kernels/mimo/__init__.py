"""The Mamba-3 MIMO scan: one operator, several backends. Start at `api`; the mathematics is in README.md."""

from libs.kernels.mimo.api import choose_backend, mamba3_mimo
from libs.kernels.mimo.shapes import Dims, MimoInputs, MimoState
from libs.kernels.mimo.step import mamba3_mimo_step

__all__ = ["Dims", "MimoInputs", "MimoState", "choose_backend", "mamba3_mimo", "mamba3_mimo_step"]
