"""FP8 weights as a run asks for them: by the gate, and by a recipe in its config; all that is missing in one refusal.

Not for what is needed (libs.parallel.fp8_ready), nor for the model (libs.model.fp8).
"""

from __future__ import annotations

from typing import cast

from apps.train.config import TrainConfig
from apps.train.facts import rank_model, rank_tokens
from libs.flags.catalog import CATALOG
from libs.flags.environment import fathom_variables
from libs.flags.errors import GateRefused, UserError
from libs.flags.gateset import GateSet
from libs.model import parameter_count
from libs.model.fp8 import fp8_elements, fp8_linears
from libs.parallel.fp8 import GATE, RECIPES, Fp8, Word, refusal
from libs.parallel.fp8_probe import probe
from libs.parallel.fp8_ready import findings
from libs.parallel.mesh import Layout

VARIABLE = CATALOG[GATE].variable


def settle_fp8(gates: GateSet | GateRefused, config: TrainConfig, layout: Layout) -> GateSet | GateRefused:
    """The gates as resolved; with the gate of FP8 asked for, only if nothing that it needs is missing on this rank.

    A refusal of that gate by the catalogue is made complete: what the catalogue asks and what the engine would need.

    Raises:
        UserError: an FP8 recipe in the config, without the gate that it is for.
    """
    word, recipe = fathom_variables().get(VARIABLE, "off"), config.parallel.fp8_recipe
    if word not in ("on", "on_untried_te"):
        if recipe is not None:
            raise UserError(
                f"parallel.fp8_recipe = {recipe!r} computes in FP8 behind a gate, which is {word}: set {VARIABLE}=on, "
                "or --parallel.fp8_recipe none to train in bf16"
            )
        return gates
    # Imports megatron.core, which takes seconds and nobody else needs.
    from libs.parallel.megatron_setup import fp8_plan

    # Without a recipe, which the catalogue refuses, the rest of the list is that of any.
    asked = Fp8(cast(Word, word), recipe or RECIPES[0])
    linears = fp8_linears(config.model.architecture(), layout.tp)
    found = tuple(findings(fp8_plan(asked, linears, rank_tokens(config, layout), layout), probe()))
    if not found:
        return gates
    refusals = gates.refusals if isinstance(gates, GateRefused) else ()
    earlier = next((one for one in refusals if one.gate == GATE), None)
    others = [one for one in refusals if one.gate != GATE]
    return GateRefused([*others, refusal(found, asked.word, earlier)])


def fp8_plan_line(config: TrainConfig, layout: Layout) -> str:
    """What a plan says of them."""
    count = fp8_elements(config.model.architecture(), layout.tp)
    return (
        f"FP8 weights ({config.parallel.fp8_recipe}): {count:,} of a rank's "
        f"{parameter_count(rank_model(config, layout)).total:,} parameters, in rows and in columns, their fp32 values "
        f"beside the optimizer's state; a run asks for {VARIABLE}=on"
    )
