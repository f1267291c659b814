"""The hybrid language model: what it is (config, presets), how it runs (hybrid), what it costs, how it is
kept.

The map is README.md. Text and tokens are in `libs.model.text`.
"""

from libs.model.config import AttentionConfig, MixerConfig, MlpConfig, ModelConfig
from libs.model.flops import FlopCount, ParameterCount, flops_per_token, parameter_count
from libs.model.hybrid import HybridLM, LMState, LossOutput
from libs.model.init import cast_model, fp32_parameter_names, no_decay
from libs.model.presets import PRESETS, dense_twin, preset

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "FlopCount",
    "HybridLM",
    "LMState",
    "LossOutput",
    "MixerConfig",
    "MlpConfig",
    "ModelConfig",
    "ParameterCount",
    "cast_model",
    "dense_twin",
    "flops_per_token",
    "fp32_parameter_names",
    "no_decay",
    "parameter_count",
    "preset",
]
