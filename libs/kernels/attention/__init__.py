"""Causal grouped-query attention over packed documents: one operator, several backends. Start at `api`."""

from libs.kernels.attention.api import attention, choose_backend

__all__ = ["attention", "choose_backend"]
