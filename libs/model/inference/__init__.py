"""The inference engine: start at `engine`. The map is README.md."""

from libs.model.inference.audit import AuditFailed
from libs.model.inference.blob import BlobRefused
from libs.model.inference.block_pool import BlockUsage
from libs.model.inference.engine import Engine
from libs.model.inference.engine_config import EngineConfig
from libs.model.inference.kv_blocks import PagedKV
from libs.model.inference.layout import (
    KvLayout,
    StateLayout,
    StatePart,
    kv_layout,
    model_fingerprint,
    state_layout,
    weights_digest,
)
from libs.model.inference.plan import MemoryPlan, plan_memory
from libs.model.inference.prefix import Admission, MissReason, PrefixCache, PrefixMode, PrefixReport
from libs.model.inference.resources import CapacityError, EngineStopped
from libs.model.inference.results import Completion, FinishReason, Generated, Scored
from libs.model.inference.rollback import Rollback
from libs.model.inference.sampler import MIN_TEMPERATURE, LogitsNotFinite, Sampling
from libs.model.inference.state_slots import NO_SLOT, StateSlots

__all__ = [
    "MIN_TEMPERATURE",
    "NO_SLOT",
    "Admission",
    "AuditFailed",
    "BlobRefused",
    "BlockUsage",
    "CapacityError",
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineStopped",
    "FinishReason",
    "Generated",
    "KvLayout",
    "LogitsNotFinite",
    "MemoryPlan",
    "MissReason",
    "PagedKV",
    "PrefixCache",
    "PrefixMode",
    "PrefixReport",
    "Rollback",
    "Sampling",
    "Scored",
    "StateLayout",
    "StatePart",
    "StateSlots",
    "kv_layout",
    "model_fingerprint",
    "plan_memory",
    "state_layout",
    "weights_digest",
]
