"""How tensors are cut over a mesh, and HLO's words for it; the versions of the lane. No torch_xla needed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from libs.flags.errors import UserError
from libs.model import HybridLM, preset
from libs.model.sharding import model_partitions, shard_rules
from libs.parallel.xla import pins
from libs.parallel.xla.topology import (
    AXES,
    TOPOLOGIES,
    MeshShape,
    Partition,
    op_sharding,
    parameter_partition,
    row_partition,
    slice_of,
    topology,
)


def devices_by_hand(partition: Partition, mesh: MeshShape) -> dict[tuple[int, ...], set[int]]:
    """Which devices hold each part, from the coordinates of each device."""
    found: dict[tuple[int, ...], set[int]] = {}
    for number, coordinates in enumerate(itertools.product(*(range(size) for size in mesh))):
        at = dict(zip(AXES, coordinates, strict=True))
        part = []
        for entry in partition:
            index = 0
            for axis in () if entry is None else (entry,) if isinstance(entry, str) else entry:
                index = index * getattr(mesh, axis) + at[axis]
            part.append(index)
        found.setdefault(tuple(part), set()).add(number)
    return found


def devices_of_text(text: str, dims: int) -> dict[tuple[int, ...], set[int]]:
    """The same, read from "{devices=[4,1]<=[4]}" (HLO's iota tile assignment)."""
    shape_text, source_text = text.removeprefix("{devices=[").split("]<=[", 1)
    shape = [int(n) for n in shape_text.split(",")]
    source, _, rest = source_text.partition("]")
    ids = np.arange(np.prod([int(n) for n in source.split(",")])).reshape([int(n) for n in source.split(",")])
    if rest.startswith("T("):
        ids = ids.transpose([int(n) for n in rest[2 : rest.index(")")].split(",")])
    tiles = ids.reshape(shape)
    found: dict[tuple[int, ...], set[int]] = {}
    for index in np.ndindex(*shape):
        found.setdefault(index[:dims], set()).add(int(tiles[index]))
    return found


CASES: list[Partition] = [
    ("fsdp", None), (None, "tensor"), ("tensor", "fsdp"), ("fsdp", "tensor"), (("data", "fsdp"), None),
    (None, ("data", "fsdp"), None), ("data", None),
]  # fmt: skip


@pytest.mark.parametrize(
    "mesh", [MeshShape(1, 4, 1), MeshShape(2, 2, 1), MeshShape(2, 2, 2), MeshShape(1, 2, 4)], ids=str
)
@pytest.mark.parametrize("partition", CASES, ids=str)
def test_hlo_says_what_the_mesh_means(mesh: MeshShape, partition: Partition) -> None:
    text, wanted = op_sharding(partition, mesh), devices_by_hand(partition, mesh)
    if len(wanted) == 1:
        assert text == "{replicated}"
    else:
        assert devices_of_text(text, len(partition)) == wanted


def test_a_parameter_is_cut_by_tensor_where_the_rules_say_and_by_fsdp_elsewhere() -> None:
    mesh = MeshShape(1, 2, 2)
    assert parameter_partition((8, 6), 0, mesh) == ("tensor", "fsdp")
    assert parameter_partition((8, 6), 1, mesh) == ("fsdp", "tensor")
    assert parameter_partition((8, 6), None, mesh) == ("fsdp", None)
    assert parameter_partition((7, 5), 0, mesh) == (None, None)  # nothing divides: whole
    assert parameter_partition((), None, mesh) == ()
    assert row_partition(2, 4, mesh) == (("data", "fsdp"), None)
    assert row_partition(2, 3, mesh) == (None, None)


def test_every_parameter_of_a_model_has_a_partition() -> None:
    with torch.device("meta"):
        model = HybridLM(preset("130m"))
    mesh = MeshShape(1, 2, 2)
    found, rules = model_partitions(model, mesh), shard_rules(model.config)
    for name, parameter in model.named_parameters():
        dim = rules[name].dim
        assert len(found[name]) == parameter.dim()
        if dim is not None:
            assert found[name][dim] == "tensor", name
    held = sum(p.numel() // np.prod([mesh.size(e) for e in found[n]]) for n, p in model.named_parameters())
    assert held < 0.3 * sum(p.numel() for p in model.parameters())


def test_an_unknown_slice_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="v6e-4"):
        topology("v6e4")
    assert {name: top.chips for name, top in TOPOLOGIES.items()} == {"v6e-1": 1, "v6e-4": 4, "v6e-8": 8}
    assert [slice_of(chips).name for chips in (1, 4, 8)] == ["v6e-1", "v6e-4", "v6e-8"]
    with pytest.raises(UserError, match=r"no TPU slice of 3 chips.*v6e-4 \(4\)"):
        slice_of(3)


def test_other_versions_are_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    have = dict(pins.PINS)
    monkeypatch.setattr(pins.importlib.metadata, "version", lambda name: have[name])
    pins.refuse_other_versions(tuple(pins.PINS), "this")
    have["torch"] = "2.9.0+cpu"  # the CPU build is the same version
    pins.refuse_other_versions(("torch",), "this")
    have["torch"] = "2.13.0"
    with pytest.raises(UserError, match=r"torch==2\.9\.0 is needed, 2\.13\.0 is installed.*make setup-tpu"):
        pins.refuse_other_versions(pins.RUNTIME, "this")

    def missing(name: str) -> str:
        raise pins.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pins.importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"libtpu==0\.0\.21 is not installed"):
        pins.refuse_other_versions(pins.AHEAD_OF_TIME, "this")
