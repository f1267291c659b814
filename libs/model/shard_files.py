"""Tensors of a checkpoint in files that several ranks wrote, read back for any other number of ranks.

A shard file holds one tensor-parallel rank's entries under keys that mean the same in every layout (`sharding`), and
says in its own header which rows of which full tensor each is. Not for the model's header (`weights`) nor for checksums
(`checkpoint`). Files of one rank that hold whole parameters are read too: they are what tp = 1 writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from libs.flags.errors import UserError
from libs.model.config import ModelConfig
from libs.model.sharding import ShardRule, check_tensor_parallel, shard_rules, to_checkpoint

LAYOUT_FILE = "layout.json"
SHARD_FORMAT = "fathom-shard"
# State of a parameter that is one number, not one per entry: stored under the parameter's name, the same on all ranks.
SCALAR_PARTS = ("step",)


class SavedLayout(BaseModel):
    """`layout.json`: the layout a checkpoint was written by, and its tensor files. Absent when one process wrote it.

    optimizer: one file per tensor-parallel rank, or one per rank of the world when the optimizer was sharded as well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["fathom-layout"] = "fathom-layout"
    format_version: Literal[1] = 1
    dp: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)
    tp: int = Field(default=1, ge=1)
    weights: tuple[str, ...] = ("model.safetensors",)
    optimizer: tuple[str, ...] = ("optimizer.safetensors",)


def read_layout(directory: Path) -> SavedLayout:
    """The layout a checkpoint was written by. Raises UserError when its file is damaged or of another version."""
    path = directory / LAYOUT_FILE
    if not path.exists():
        return SavedLayout()
    try:
        return SavedLayout.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is not the layout of a checkpoint of this version: {error}") from error


def shard_name(kind: str, rank: int, size: int, part: int = 0, parts: int = 1) -> str:
    """File name of one tensor-parallel rank, and of one part of its optimizer state when that is sharded too."""
    tail = f"-part{part:03d}of{parts:03d}" if parts > 1 else ""
    return f"{kind}-tp{rank:03d}of{size:03d}{tail}.safetensors"


class Extent(BaseModel):
    """Where an entry of a shard file lies in its full tensor: from `start` along `dim`; dim None: it is all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int | None
    start: int
    full_shape: tuple[int, ...]


def write_shard(path: Path, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> None:
    """Write one tensor-parallel rank's tensors: parameters by name, or optimizer state as "<part>/<name>".

    Raises OSError or SafetensorError (disk full) as they come.
    """
    by_part: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.rpartition("/")
        by_part.setdefault(part, {})[name] = tensor
    content: dict[str, Tensor] = {}
    extents: dict[str, Extent] = {}
    for part, named in by_part.items():
        prefix = f"{part}/" if part else ""
        if part in SCALAR_PARTS:
            content |= {prefix + name: tensor for name, tensor in named.items()}
            extents |= {
                prefix + name: Extent(dim=None, start=0, full_shape=tuple(t.shape)) for name, t in named.items()
            }
            continue
        for key, entry in to_checkpoint(named, config, rank, size).items():
            content[prefix + key] = entry.tensor.detach().contiguous().cpu()
            extents[prefix + key] = Extent(dim=entry.dim, start=entry.start, full_shape=tuple(entry.full_shape))
    table = {key: extent.model_dump(mode="json") for key, extent in extents.items()}
    metadata = {"format": SHARD_FORMAT, "format_version": "1", "entries": json.dumps(table, sort_keys=True)}
    # Copies: segments of one parameter share its storage, which safetensors refuses to write twice.
    save_file({key: tensor.clone() for key, tensor in content.items()}, path, metadata=metadata)


class TensorRow(NamedTuple):
    """One tensor of a checkpoint as `inspect` shows it: its full shape, and in how many pieces it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: int


class _Piece(NamedTuple):
    """Rows [start, start + length) of a full entry, stored in `file` under `key` from row `offset` on."""

    file: Any
    key: str
    dim: int | None
    offset: int
    start: int
    length: int

    def read(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of the full entry, which must lie in this piece."""
        if self.dim is None:
            whole: Tensor = self.file.get_tensor(self.key)
            return whole
        at = slice(begin - self.start + self.offset, end - self.start + self.offset)
        part: Tensor = self.file.get_slice(self.key)[(slice(None),) * self.dim + (at,)]
        return part


class LocalTensors(Mapping[str, Tensor]):
    """One rank's tensors of a checkpoint under parameter names, cut for `rank` of `size` whatever layout wrote them.

    Nothing is read before it is asked for, and of a file only the rows that are needed. Keys: parameter names, or
    "<part>/<parameter name>" in optimizer files.
    """

    def __init__(self, files: Iterable[Path], config: ModelConfig, rank: int = 0, size: int = 1) -> None:
        """Read the headers.

        Raises:
            UserError: a file is missing or damaged, holds a tensor of no parameter of this model, or `size` cannot
                shard it.
        """
        check_tensor_parallel(config, size)
        self._rank, self._size = rank, size
        self._rules = shard_rules(config)
        self._pieces: dict[str, list[_Piece]] = {}
        self._names: dict[str, None] = {}
        by_entry = {entry: name for name, rule in self._rules.items() for entry in _entries(name, rule)}
        for path in files:
            self._add_file(path, by_entry)

    def _add_file(self, path: Path, by_entry: Mapping[str, str]) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}") from error
        metadata = file.metadata() or {}
        sharded = metadata.get("format") == SHARD_FORMAT
        table = _extents(path, metadata) if sharded else {}
        if sharded and table.keys() != set(file.keys()):
            odd = sorted(table.keys() ^ set(file.keys()))
            raise UserError(f"{path} does not hold what its own header lists: {odd[0]!r}")
        for key in file.keys():  # noqa: SIM118 (not a dict)
            part, _, entry = key.rpartition("/")
            prefix = f"{part}/" if part else ""
            scalar = part in SCALAR_PARTS
            name = by_entry.get(entry) if sharded and not scalar else entry
            if name not in self._rules:
                raise UserError(f"{path}: tensor {key!r} belongs to no parameter of this model")
            self._names.setdefault(prefix + name)
            if sharded or scalar:
                extent = table[key] if sharded else Extent(dim=None, start=0, full_shape=())
                self._add(key, _sharded_piece(file, key, extent))
            else:
                for entry_key, piece in _whole_pieces(file, key, self._rules[name], path):
                    self._add(entry_key, piece)

    def _add(self, entry: str, piece: _Piece) -> None:
        self._pieces.setdefault(entry, []).append(piece)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, key: str) -> Tensor:
        """Raises KeyError for an unknown name; UserError when the files do not hold all rows of it exactly once."""
        if key not in self._names:
            raise KeyError(key)
        part, _, name = key.rpartition("/")
        rule = self._rules[name]
        if rule.dim is None or part in SCALAR_PARTS:
            return self._pieces[key][0].read(0, 0)
        prefix = f"{part}/" if part else ""
        parts = []
        for entry, segment in zip(_entries(name, rule), rule.segments, strict=True):
            width = segment.width // self._size
            pieces = self._covering(prefix + entry, segment.width)
            parts.append(_rows(pieces, self._rank * width, (self._rank + 1) * width, rule.dim))
        return parts[0] if len(parts) == 1 else torch.cat(parts, rule.dim)

    def _covering(self, entry: str, width: int) -> list[_Piece]:
        """The pieces of an entry in order, without gap or overlap."""
        pieces = sorted(self._pieces.get(entry, []), key=lambda piece: piece.start)
        at = 0
        for piece in pieces:
            if piece.start != at:
                break
            at += piece.length
        else:
            if at == width:
                return pieces
        found = ", ".join(f"[{piece.start}, {piece.start + piece.length})" for piece in pieces) or "none"
        raise UserError(f"checkpoint tensor {entry!r} has {width} rows, its shards hold {found}: a shard is missing")

    def check_whole(self) -> None:
        """Refuse a parameter of which the files do not hold every row exactly once; reads headers only.

        Raises:
            UserError: naming the first, with what there is of it.
        """
        for key in self._names:
            part, _, name = key.rpartition("/")
            rule = self._rules[name]
            if rule.dim is not None and part not in SCALAR_PARTS:
                prefix = f"{part}/" if part else ""
                for entry, segment in zip(_entries(name, rule), rule.segments, strict=True):
                    self._covering(prefix + entry, segment.width)

    def table(self) -> list[TensorRow]:
        """Every parameter (or piece of optimizer state) by full shape; reads headers only."""
        rows = []
        for key in self._names:
            part, _, name = key.rpartition("/")
            rule = self._rules[name]
            cut = rule.dim is not None and part not in SCALAR_PARTS
            entries = [f"{part}/{e}" if part else e for e in _entries(name, rule)] if cut else [key]
            first = self._pieces[entries[0]][0]
            stored = first.file.get_slice(first.key)
            shape = list(stored.get_shape())
            if rule.dim is not None and cut:
                shape[rule.dim] = sum(segment.width for segment in rule.segments)
            pieces = len({id(piece.file) for entry in entries for piece in self._pieces[entry]})
            rows.append(TensorRow(key, str(stored.get_dtype()), tuple(shape), pieces))
        return rows


def _entries(name: str, rule: ShardRule) -> list[str]:
    """Checkpoint keys of a parameter, one per segment, as `sharding.to_checkpoint` names them."""
    return [f"{name}.{segment.key}" if segment.key else name for segment in rule.segments] or [name]


def _extents(path: Path, metadata: Mapping[str, str]) -> dict[str, Extent]:
    try:
        table = json.loads(metadata["entries"])
        return {key: Extent.model_validate(value) for key, value in table.items()}
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: the header of a shard is damaged: {error!r}") from error


def _sharded_piece(file: Any, key: str, extent: Extent) -> _Piece:
    if extent.dim is None:
        return _Piece(file, key, None, 0, 0, 0)
    length = int(file.get_slice(key).get_shape()[extent.dim])
    return _Piece(file, key, extent.dim, 0, extent.start, length)


def _whole_pieces(file: Any, key: str, rule: ShardRule, path: Path) -> Iterator[tuple[str, _Piece]]:
    """The segments of a parameter that is stored whole."""
    if rule.dim is None:
        yield key, _Piece(file, key, None, 0, 0, 0)
        return
    shape: Sequence[int] = file.get_slice(key).get_shape()
    width = sum(segment.width for segment in rule.segments)
    if len(shape) <= rule.dim or shape[rule.dim] != width:
        raise UserError(f"{path}: tensor {key!r} is {tuple(shape)}, the model has {width} along dimension {rule.dim}")
    offset = 0
    for entry, segment in zip(_entries(key, rule), rule.segments, strict=True):
        yield entry, _Piece(file, key, rule.dim, offset, 0, segment.width)
        offset += segment.width


def _rows(pieces: Sequence[_Piece], begin: int, end: int, dim: int) -> Tensor:
    """Rows [begin, end) of a full entry from the pieces that hold some of them."""
    parts = [
        piece.read(max(begin, piece.start), min(end, piece.start + piece.length))
        for piece in pieces
        if piece.start < end and begin < piece.start + piece.length
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
