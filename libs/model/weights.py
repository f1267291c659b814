"""A model on disk: model.safetensors (or one shard per tensor-parallel rank) and model.json (config, format version,
identity), and the refusals at load.

Not for optimizer state (apps.train), for the inside of a shard (`shard_files`), nor for committing a directory as a
checkpoint (see `checkpoint`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from libs.flags.errors import UserError
from libs.model.config import ModelConfig
from libs.model.hybrid import Checkpointing, HybridLM
from libs.model.shard_files import LocalTensors, read_layout

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "model.json"
FORMAT = "fathom-model"
FORMAT_VERSION = 1


def save_model(directory: Path, model: HybridLM, *, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write both files into an existing directory. Raises OSError (disk full) as it comes.

    Args:
        tensors: the parameters' values to write, by name; the present ones by default.
    """
    whole = model.parallel is None or model.parallel.tp.size == 1
    assert whole, "one rank's shards are not a model: they go to files of their own (libs.model.shard_files)"
    values = dict(model.named_parameters()) if tensors is None else tensors
    contiguous = {name: value.detach().contiguous().cpu() for name, value in values.items()}
    save_file(contiguous, directory / WEIGHTS_FILE, metadata={"format": FORMAT})
    write_config(directory, model.config)


def write_config(directory: Path, config: ModelConfig) -> None:
    """Write model.json: what `read_config` reads."""
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "a_activation": None if config.mixer is None else config.mixer.a_activation,
        "config": config.model_dump(mode="json"),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(header, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(directory: Path) -> ModelConfig:
    """The config a directory was saved with. Raises UserError when there is none, or of another format."""
    path = directory / CONFIG_FILE
    try:
        header: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{directory} holds no saved model: {CONFIG_FILE} is missing") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    found = (header.get("format"), header.get("format_version")) if isinstance(header, dict) else (None, None)
    if found != (FORMAT, FORMAT_VERSION):
        raise UserError(
            f"{path}: format {found[0]!r} version {found[1]!r}; this program reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    if not isinstance(header.get("config"), dict):
        raise UserError(f"{path}: `config` is missing")
    config = ModelConfig.parse(header["config"])
    activation = None if config.mixer is None else config.mixer.a_activation
    if header.get("a_activation") != activation:
        raise UserError(f"{path}: a_activation is {header.get('a_activation')!r} but its config says {activation!r}")
    return config


def check_identity(found: ModelConfig, expect: ModelConfig, where: Path) -> None:
    """Refuse weights of another model. Raises UserError listing every differing field with both values."""
    ours, theirs = expect.identity(), found.identity()
    differing = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if differing:
        lines = [f"{key}: checkpoint {theirs.get(key)!r}, expected {ours.get(key)!r}" for key in differing]
        raise UserError(f"{where} is another model than the one asked for:\n  " + "\n  ".join(lines))


def _check_tensors(tensors: Mapping[str, Tensor], model: HybridLM, path: Path) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        names = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
        shown = "\n  ".join(f"{name}: file {found.get(name)}, config {wanted.get(name)}" for name in names[:8])
        raise UserError(f"{path} does not fit its own {CONFIG_FILE} in {len(names)} tensors:\n  {shown}")


def load_model(
    directory: Path,
    *,
    expect: ModelConfig | None = None,
    device: torch.device | str = "cpu",
    mimo_backend: str = "auto",
    attention_backend: str = "auto",
    loss_backend: str = "auto",
    activation_checkpointing: Checkpointing = "none",
) -> HybridLM:
    """Rebuild a saved model on `device`, whole, in the dtypes it was saved in, whatever layout it was saved from.

    Args:
        expect: the config the caller is going to use; it must agree in everything that gives the weights
            their meaning (geometry, a_activation, ...) and then replaces the saved one (chunk size,
            mtp_weight, ...).

    Raises:
        UserError: nothing saved there, damaged files, or another model than expected, with both values.
    """
    config = read_config(directory)
    if expect is not None:
        check_identity(config, expect, directory)
    path = directory / WEIGHTS_FILE
    tensors = _whole_tensors(directory, config, device)
    with torch.device("meta"):
        model = HybridLM(config if expect is None else expect, activation_checkpointing=activation_checkpointing)
    _check_tensors(tensors, model, path)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.request_backends(mimo=mimo_backend, attention=attention_backend, loss=loss_backend)
    return model


def _whole_tensors(directory: Path, config: ModelConfig, device: torch.device | str) -> dict[str, Tensor]:
    layout = read_layout(directory)
    if layout.tp > 1:
        merged = LocalTensors([directory / name for name in layout.weights], config)
        return {name: tensor.to(device) for name, tensor in merged.items()}
    path = directory / WEIGHTS_FILE
    try:
        return load_file(path, device=str(device))
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error


def load_parameters(directory: Path, model: HybridLM) -> None:
    """Copy saved weights into a model that exists, which may hold one tensor-parallel rank's shards.

    Values are copied, not adopted: a vectorised sum may depend on alignment, and a file's is not torch's. Only this
    rank's rows are read from the files.

    Raises:
        UserError: nothing saved there, damaged files, or another model, with both values.
    """
    tensors = read_parameters(directory, model)
    _check_tensors(tensors, model, directory)
    model.load_state_dict(tensors, strict=True)


def read_parameters(directory: Path, model: HybridLM) -> dict[str, Tensor]:
    """Saved weights as a rank of this model's layout holds them: by the names of `HybridLM`, on the host.

    Raises:
        UserError: as `load_parameters`, but for shapes that do not fit.
    """
    check_identity(read_config(directory), model.config, directory)
    rank, size = (0, 1) if model.parallel is None else (model.parallel.tp.rank, model.parallel.tp.size)
    files = [directory / name for name in read_layout(directory).weights]
    local = LocalTensors(files, model.config, rank, size)
    return {name: local[name] for name in local}
