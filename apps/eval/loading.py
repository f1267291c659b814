"""From a checkpoint to what an engine needs: the device, the facts for the gates, the tokenizer.

Not for weights (`libs.model.weights`) nor for the data that a checkpoint was trained on (`place`).
"""

from __future__ import annotations

from pathlib import Path

import torch

from libs.flags.errors import UserError
from libs.flags.facts import Facts
from libs.kernels.mimo import choose_backend
from libs.model.config import ModelConfig
from libs.model.inference import EngineConfig
from libs.model.text.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


def choose_device(requested: str) -> torch.device:
    """ "auto" (a GPU if there is one), "cpu" or "cuda". Raises UserError for a GPU that is not there."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device on this machine; allowed here: auto, cpu")
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(requested)


def eval_facts(device: torch.device) -> Facts:
    """What the gates of an evaluation are resolved against. Nothing is drafted, so speculation is refused."""
    on_gpu = device.type == "cuda"
    return Facts(
        device="cuda" if on_gpu else "cpu",
        device_name=torch.cuda.get_device_name() if on_gpu else None,
        compute_capability=torch.cuda.get_device_capability() if on_gpu else None,
        device_count=torch.cuda.device_count() if on_gpu else None,
        mimo_backend=choose_backend("auto", device).value,
        state_slots=True,
    )


def engine_facts(device: torch.device, model: ModelConfig, engine: EngineConfig) -> Facts:
    """As `eval_facts`, for one engine that may draft."""
    drafts = {
        "mtp_depth": model.mtp_depth,
        "draft_length": engine.draft_length,
        "kv_block_size": engine.block_size,
    }
    return eval_facts(device).model_copy(update=drafts)


def load_tokenizer(checkpoint: Path, model: ModelConfig) -> Tokenizer:
    """The one that the checkpoint was trained with. Raises UserError when it has more ids than the model."""
    tokenizer = Tokenizer.load(checkpoint / TOKENIZER_FILE)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{checkpoint}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}: it cannot have "
            "been trained with it"
        )
    return tokenizer
