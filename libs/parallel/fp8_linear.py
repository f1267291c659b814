"""A linear map whose weight is an FP8 parameter of transformer-engine, for a rank's own rows and columns.

It knows nothing of ranks, like every layer here: blocks communicate before and after it (`tensor`).
"""
# T tokens of all sequences  I, O widths

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libs.parallel.fp8 import TOKEN_MULTIPLE, Fp8

_RECIPES = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}


class Fp8Linear(nn.Module):
    """x (..., I) -> (..., O) without bias, in the dtype of autocast.

    Forward enters an FP8 context of its own, since a block is computed a second time in backward, outside of any
    context around the model. That is right for recipes without state only, which `RECIPES` are.
    """

    def __init__(self, weight_OI: Tensor, asked: Fp8) -> None:
        """Takes over the values. The parameter is called `linear.weight`; its nominal dtype is bf16."""
        super().__init__()
        values = [weight_OI]

        def fill(parameter: Tensor) -> None:
            with torch.no_grad():
                parameter.copy_(values[0])

        te, self._recipe = _transformer_engine(), _recipe(asked)
        rows, columns = weight_OI.shape
        with te.quantized_model_init(enabled=True, recipe=self._recipe, preserve_high_precision_init_val=True):
            self.linear = te.Linear(
                columns, rows, bias=False, params_dtype=torch.bfloat16, init_method=fill, device=weight_OI.device
            )
        values.clear()  # TE keeps `fill` for as long as the linear lives

    def forward(self, x: Tensor) -> Tensor:
        x_TI = x.flatten(0, -2)
        tokens = x_TI.shape[0]
        # A training step's tokens fit (a precondition); a document that is scored may have any length.
        if missing := -tokens % TOKEN_MULTIPLE:
            x_TI = F.pad(x_TI, (0, 0, 0, missing))
        with _transformer_engine().autocast(enabled=True, recipe=self._recipe):
            out_TO: Tensor = self.linear(x_TI)
        return out_TO[:tokens].view(*x.shape[:-1], -1)


@functools.cache
def _transformer_engine() -> Any:
    # Optional, and not to be imported where it is half installed (`fp8_probe`).
    return importlib.import_module("transformer_engine.pytorch")


def _recipe(asked: Fp8) -> Any:
    recipes = importlib.import_module("transformer_engine.common.recipe")
    return getattr(recipes, _RECIPES[asked.recipe])(fp8_format=recipes.Format[asked.format.upper()])
