"""Random seeds by role in the layout: what must be equal on which ranks, and what must differ.

Not for initial values (drawn by parameter name, see `libs.model.init`) nor for the order of the data (one permutation
for the whole run): both are the same on every rank whatever the layout.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from libs.parallel.mesh import Groups


class Seeds(NamedTuple):
    """Seeds in [0, 2^63).

    Attributes:
        everywhere: equal on all ranks.
        replicated: for randomness on activations that the ranks of a tensor group hold whole: equal within the group,
            different for every (dp, cp).
        sharded: for randomness on shards: different on every rank.
    """

    everywhere: int
    replicated: int
    sharded: int


def _derive(seed: int, *role: object) -> int:
    digest = hashlib.sha256(":".join(str(part) for part in (seed, *role)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def role_seeds(seed: int, groups: Groups) -> Seeds:
    """The seeds of this rank. Those of one coordinate do not depend on how many ranks there are."""
    dp, cp, tp = groups.dp.rank, groups.cp.rank, groups.tp.rank
    return Seeds(
        everywhere=_derive(seed, "everywhere"),
        replicated=_derive(seed, "replicated", dp, cp),
        sharded=_derive(seed, "sharded", dp, cp, tp),
    )
