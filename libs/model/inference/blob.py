"""Captured states as bytes: a safetensors file in memory that names its model and its layout and has its own checksum.

Every check happens before any tensor is handed out, so a refused blob cannot have been half used.
Not for deciding what is captured or where it goes (`state_slots`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = "fathom-state"
VERSION = "1"
_NO_DIGEST = "0" * 64
# Names of the safetensors format.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32",
}  # fmt: skip


class BlobRefused(ValueError):
    """A blob that is not what this model and layout wrote, or not all of it. Nothing was changed."""


class Spec(NamedTuple):
    """Shape and dtype of one tensor of a blob."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name. Raises ValueError for a dtype without one here."""
    if dtype not in _DTYPES:
        raise ValueError(f"states of {dtype} cannot be written (known: {', '.join(map(str, _DTYPES))})")
    return _DTYPES[dtype]


def _table(specs: Mapping[str, Spec]) -> dict[str, Any]:
    """The safetensors entry of each tensor, laid out one after the other in order of names."""
    table, end = {}, 0
    for name in sorted(specs):
        spec, start = specs[name], end
        end += spec.nbytes
        table[name] = {"dtype": dtype_name(spec.dtype), "shape": list(spec.shape), "data_offsets": [start, end]}
    return table


def _header(table: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    text = json.dumps({"__metadata__": dict(metadata), **table}, sort_keys=True, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _metadata(contents: str, identity: Mapping[str, str], tokens: int) -> dict[str, str]:
    """Of a blob whose digest is not known yet."""
    named = {"format": FORMAT, "version": VERSION, "contents": contents, "tokens": str(tokens)}
    return {**identity, **named, "sha256": _NO_DIGEST}


def packed_bytes(specs: Mapping[str, Spec], *, contents: str, identity: Mapping[str, str], tokens: int) -> int:
    """The length of what `pack` would make of such tensors."""
    header = _header(_table(specs), _metadata(contents, identity, tokens))
    return 8 + len(header) + sum(spec.nbytes for spec in specs.values())


def _digest(header: bytes, data: bytes | memoryview) -> str:
    digest = hashlib.sha256(header)
    digest.update(data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    raw: bytes = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return raw


def pack(tensors: Mapping[str, Tensor], *, contents: str, identity: Mapping[str, str], tokens: int) -> bytes:
    """The bytes of a blob.

    Args:
        tensors: on any device; copied. contents: which of the kinds of blob it is. identity: what a reader must agree
            on (model, layout, ...). tokens: how many tokens the states have absorbed.
    """
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    data = b"".join(_bytes(tensors[name]) for name in sorted(specs))
    table, metadata = _table(specs), _metadata(contents, identity, tokens)
    digest = _digest(_header(table, metadata), data)
    header = _header(table, {**metadata, "sha256": digest})
    return len(header).to_bytes(8, "little") + header + data


def _parse(blob: bytes) -> tuple[dict[str, Any], dict[str, str], bytes, memoryview]:
    """(tensor table, metadata, header, data)."""
    size = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or not 2 <= size <= len(blob) - 8:
        raise BlobRefused(f"truncated state blob: {len(blob)} bytes do not hold a header")
    header = blob[8 : 8 + size]
    try:
        table = json.loads(header)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BlobRefused(f"corrupt state blob: its header is not JSON ({error})") from error
    metadata = table.pop("__metadata__", None) if isinstance(table, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BlobRefused("corrupt state blob: its header names no format")
    return table, metadata, header, memoryview(blob)[8 + size :]


def unpack(
    blob: bytes, contents: Mapping[str, Mapping[str, Spec]], *, identity: Mapping[str, str]
) -> tuple[dict[str, Tensor], int]:
    """The tensors (on the CPU) and the token count of a blob that is exactly as expected.

    Args:
        contents: the tensors that a blob of each kind of contents has.

    Raises:
        BlobRefused: another format or version, truncated or changed bytes, another identity (naming the field and both
            values), or other tensors.
    """
    table, metadata, header, data = _parse(blob)
    found = (metadata.get("format"), metadata.get("version"))
    if found != (FORMAT, VERSION):
        raise BlobRefused(f"state blob is {found[0]!r} version {found[1]!r}, this program reads {FORMAT!r} {VERSION!r}")
    recorded = metadata.get("sha256", "")
    if len(recorded) != len(_NO_DIGEST) or header != _header(table, metadata):
        raise BlobRefused("corrupt state blob: its header is not as written")
    if _digest(_header(table, {**metadata, "sha256": _NO_DIGEST}), data) != recorded:
        raise BlobRefused(f"corrupt or truncated state blob: its {len(blob)} bytes do not have the recorded sha256")
    for name, value in identity.items():
        if metadata.get(name) != value:
            raise BlobRefused(f"state blob of another {name}: {metadata.get(name)!r}, expected {value!r}")
    specs = contents.get(metadata.get("contents", ""))
    if specs is None or table != _table(specs):
        raise BlobRefused(f"state blob of {metadata.get('contents')!r} holds other tensors than here: {sorted(table)}")
    tensors = {}
    for name, spec in specs.items():
        start, end = table[name]["data_offsets"]
        # A copy: the blob is immutable, and its data need not be aligned.
        raw = torch.frombuffer(bytearray(data[start:end]), dtype=torch.uint8)
        tensors[name] = raw.view(spec.dtype).view(spec.shape)
    return tensors, int(metadata["tokens"])
