"""Output projection and cross-entropy in one operator: whole logits never exist. Start at `api`."""

from libs.kernels.loss.api import choose_backend, linear_cross_entropy

__all__ = ["choose_backend", "linear_cross_entropy"]
