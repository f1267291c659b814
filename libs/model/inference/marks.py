"""Known prefixes kept by name, in the engine and as files: what `Engine.checkpoint`, `save_marks` and `load_marks` do.

A file holds the tokens, the keys and values of all attention layers and the states of all recurrent ones, under the
name of the model, the layout and everything that decides about bits, with a checksum. Not for choosing what is marked.
"""
# T tokens  G kv heads  K head width

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.flags.whole_file import write_whole
from libs.kernels.backend import Choice
from libs.model.hybrid import HybridLM
from libs.model.inference.blob import BlobRefused, Spec, pack, unpack
from libs.model.inference.kv_blocks import PagedKV
from libs.model.inference.prefix import Admission, PrefixCache, PrefixMode
from libs.model.inference.resources import CapacityError
from libs.model.inference.state_slots import StateSlots

INDEX = "marks.json"
CONTENTS = "mark"
MAX_NAME = 200

Compute = Callable[[int, int, int], None]


class Marks:
    """Pins prefixes in a prefix cache with snapshots. They outlive everything that is cached, and give way, oldest
    first, to a request or a mark that otherwise could not run.

    Attributes:
        tokens: of each mark, by name, oldest first.
    """

    def __init__(
        self, cache: PrefixCache, kv: PagedKV, slots: StateSlots, *, identity: Mapping[str, str], grid: int
    ) -> None:
        """identity: what must agree for the bits to be the same: model, device, versions, backends."""
        self._cache, self._kv, self._slots = cache, kv, slots
        self._identity = {**identity, "kv": f"{kv.layout}", "states": f"{slots.layout}", "grid": str(grid)}
        self.tokens: dict[str, tuple[int, ...]] = {}

    def add(self, name: str, prompt: tuple[int, ...], request: int, compute: Compute) -> None:
        """Compute and pin a prefix, rounded down to a boundary; nothing when that is no token at all.

        Args:
            request: a number nobody else has. compute: runs (slot, start, end) of the prompt and reports it.

        Raises:
            UserError: a mode without snapshots, or a name that is bad or used.
            CapacityError: no slot, or no room even without any other mark; then none gives way.
        """
        self._check(name)
        end = len(prompt) // self._cache.unit * self._cache.unit
        if end:
            self._refuse_impossible(prompt[:end])
            with self._admitted(request, prompt[:end]) as admitted:
                compute(admitted.slot, admitted.start, end)
                self._pin(name, prompt[:end], request)

    def drop_oldest(self) -> bool:
        """Make its blocks and its state cache like any other; False when there is no mark."""
        if not self.tokens:
            return False
        self._drop(next(iter(self.tokens)))
        self._cache.counters["marks_dropped"] += 1
        return True

    def forget(self) -> None:
        """All names; the pins go with `PrefixCache.clear`."""
        self.tokens.clear()

    def save(self, directory: Path) -> None:
        """Write every mark to a file of its own, and an index, in place of the marks that are there.

        A file's name is its sha256, and the index comes last: until then the directory holds the marks it held.

        Raises:
            UserError: the directory cannot be written, or a mark lost its state.
        """
        index, files = {}, set[Path]()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, tokens in self.tokens.items():
                blob = pack(self._tensors(name), contents=CONTENTS, identity=self._identity, tokens=len(tokens))
                digest = hashlib.sha256(blob).hexdigest()
                index[name] = {"sha256": digest, "tokens": len(tokens)}
                files.add(directory / _file(digest))
                write_whole(directory / _file(digest), blob)
            write_whole(directory / INDEX, f"{json.dumps(index, indent=1)}\n".encode())
            for stale in set(directory.glob(_file("*"))) - files:
                stale.unlink()
        except OSError as error:
            raise UserError(f"cannot write marks to {directory}: {error.strerror}") from error

    def load(self, directory: Path, next_request: Callable[[], int]) -> tuple[str, ...]:
        """Pin every mark of a directory; their names. All are checked whole before anything of any is used.

        Raises:
            UserError: no index, a file that is missing, changed, not the one the index names, or of another model,
                layout, device or version. CapacityError: as `add`. None of them is pinned then.
        """
        found = {}
        for name, (digest, count) in _read_index(directory).items():
            self._check(name)
            found[name] = self._read(name, directory / _file(digest), digest, count)
            self._refuse_impossible(_tokens(found[name]))
        try:
            for name, tensors in found.items():
                self._plant(name, tensors, next_request())
        except BaseException:
            for name in found.keys() & self.tokens.keys():
                self._drop(name)
            raise
        return tuple(self.tokens)

    def _drop(self, name: str) -> None:
        del self.tokens[name]
        self._cache.unpin(name)

    def _read(self, name: str, path: Path, digest: str, count: int) -> dict[str, Tensor]:
        if count % self._cache.unit or not count:
            raise UserError(f"mark {name!r} has {count} tokens; boundaries are multiples of {self._cache.unit} here")
        try:
            blob = path.read_bytes()
            if hashlib.sha256(blob).hexdigest() != digest:
                raise BlobRefused(f"{path.name} is not the file that was saved: another sha256; save the marks again")
            return unpack(blob, {CONTENTS: self._specs(count)}, identity=self._identity)[0]
        except (OSError, BlobRefused) as error:
            raise UserError(f"mark {name!r} cannot be used: {error}") from error

    def _refuse_impossible(self, tokens: tuple[int, ...]) -> None:
        """Raises CapacityError when a mark would not fit if every other one gave way."""
        marked = {pin.request for pin in self._cache.pins.values()}
        running = {block for other in self._kv.requests if other not in marked for block in self._kv.table(other)}
        known = self._kv.match(tokens)
        needed = self._kv.layout.blocks_for(len(tokens)) - len(known)
        available = self._kv.blocks - 1 - len(running.union(known))
        if needed > available:
            what = f"KV blocks (of {self._kv.blocks - 1}) beside those of running requests"
            raise CapacityError(what, needed=needed, available=available)
        size, limit = self._slots.capture_bytes(len(tokens)), self._cache.max_snapshot_bytes
        if self._slots.num_layers and size > limit:
            raise CapacityError("bytes for states (snapshot_bytes)", needed=size, available=limit)

    def _check(self, name: str) -> None:
        if self._cache.mode is not PrefixMode.SNAPSHOTS:
            raise UserError(f"marks need FATHOM_PREFIX_CACHE=snapshots, it is {self._cache.mode.value}")
        if not name.isprintable() or not 1 <= len(name) <= MAX_NAME:
            raise UserError(f"mark name {name[:MAX_NAME]!r}: 1 to {MAX_NAME} printable characters")
        if name in self.tokens:
            raise UserError(f"there is a mark {name!r} already; give another name")

    @contextmanager
    def _admitted(self, request: int, prompt: tuple[int, ...]) -> Iterator[Admission]:
        """A slot and blocks, given back when the body raises."""
        while True:
            try:
                admitted = self._cache.admit(request, prompt, common=len(prompt))
                break
            except CapacityError:
                if not self._slots.available or not self.drop_oldest():
                    raise
        try:
            yield admitted
        except BaseException:
            self._cache.release(request)
            raise

    def _pin(self, name: str, tokens: tuple[int, ...], request: int) -> None:
        while not self._cache.pin(request, name):
            dropped = self.drop_oldest()
            assert dropped, "without any other mark there is room, or it was refused before"
            self._cache.capture(request)
        self.tokens[name] = tokens

    def _plant(self, name: str, tensors: Mapping[str, Tensor], request: int) -> None:
        tokens = _tokens(tensors)
        with self._admitted(request, tokens) as admitted:
            start, device = admitted.start, self._kv.device
            for layer in self._kv.layout.layers:
                keys, values = (tensors[f"{part}.{layer}"][start:].to(device) for part in ("keys", "values"))
                self._kv.write(layer, request, start, keys, values)
            for layer in self._slots.layout.layers:
                parts = [tensors[f"{part.name}.{layer}"][None].to(device) for part in self._slots.layout.recurrent]
                self._slots.write_rows(layer, [admitted.slot], parts)
            self._cache.completed(request, tokens[start:])
            self._pin(name, tokens, request)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        pin = self._cache.pins[name]
        tensors = {"tokens": torch.tensor(self.tokens[name], dtype=torch.int64)}
        for layer in self._kv.layout.layers:
            pair = self._kv.read(layer, pin.request, pin.tokens)
            tensors |= {f"{part}.{layer}": tensor for part, tensor in zip(("keys", "values"), pair, strict=True)}
        blob = self._cache.state_at(pin)
        if self._slots.num_layers:
            if blob is None:
                raise UserError(f"mark {name!r} has lost its state; mark it again before saving")
            for part, states in self._slots.read_blob(blob).items():
                tensors |= {
                    f"{part}.{layer}": state for layer, state in zip(self._slots.layout.layers, states, strict=True)
                }
        return tensors

    def _specs(self, tokens: int) -> dict[str, Spec]:
        kv, states = self._kv.layout, self._slots.layout
        specs = {"tokens": Spec((tokens,), torch.int64)}
        for layer in kv.layers:
            for part in ("keys", "values"):
                specs[f"{part}.{layer}"] = Spec((tokens, kv.kv_heads, kv.head_dim), kv.dtype)
        for layer in states.layers:
            specs |= {f"{part.name}.{layer}": Spec(part.shape, part.dtype) for part in states.recurrent}
        return specs


def _tokens(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(tensors["tokens"].tolist())


def _file(digest: str) -> str:
    return f"mark-{digest}.safetensors"


def _read_index(directory: Path) -> dict[str, tuple[str, int]]:
    """By name: the file's sha256, and the tokens."""
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        return {name: (str(entry["sha256"]), int(entry["tokens"])) for name, entry in index.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{directory / INDEX} names no marks: {error!r}") from error


def identity_of(model: HybridLM, fingerprint: str, tile: Choice) -> dict[str, str]:
    """What decides about bits besides the memory's layout: who reads a saved state must agree on all of it."""
    backends = {name: choice.value for name, choice in sorted(model.choices.items())}
    built = f"torch {torch.__version__}, {model.head_weight.device.type}, {torch.get_num_threads()} threads"
    return {"model": fingerprint, "runner": f"{built}, tile {tile.value}, {backends}"}
