"""What a build can be asked for, validated in one place.

For the command line and for tests that build. Not for what was built (see `libs.model.text.manifest`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from libs.flags.errors import UserError

INSTALLED = "installed"
# Raised whenever the same source and options would give other documents.
PIPELINE_VERSION = 2

M = TypeVar("M", bound=BaseModel)


class Mix(BaseModel):
    """Tokens of each kind of document per token of source text: file=1 is every file once, 0 none of the kind.

    A kind stops early when its material runs out; `inspect` shows what came out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: float = Field(default=1.0, ge=0, le=1)
    callgraph: float = Field(default=0.75, ge=0, le=8)
    unit: float = Field(default=0.25, ge=0, le=8)

    @model_validator(mode="after")
    def _something(self) -> Mix:
        if self.file + self.callgraph + self.unit == 0:
            raise ValueError("all three kinds are 0: nothing would be written")
        return self

    @classmethod
    def parse(cls, text: str) -> Mix:
        """From "file=1,callgraph=0.75,unit=0.25"; a kind that is not named is 0."""
        given: dict[str, Any] = dict.fromkeys(cls.model_fields, 0.0)
        for item in text.split(","):
            name, _, value = item.partition("=")
            if name not in given:
                raise UserError.unknown("kind of document", name, given)
            given[name] = value
        return validated(cls, given, "--mix")


class BuildOptions(BaseModel):
    """Everything that decides the content of a data directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = INSTALLED
    layout: Literal["auto", "repositories", "repository"] = "auto"
    tokenizer: str = "bpe:4096"
    tokenizer_bytes: int = Field(default=8_000_000, ge=1)
    max_bytes: int = Field(default=24_000_000, ge=1)
    max_file_bytes: int = Field(default=400_000, ge=1)
    max_line_bytes: int = Field(default=1_000, ge=1)
    duplicate_threshold: float = Field(default=0.8, ge=0.3, le=0.95)
    valid_share: float = Field(default=0.05, gt=0, lt=0.5)
    valid_packages: tuple[str, ...] = ()
    mix: Mix = Mix()
    document_tokens: int = Field(default=65_536, ge=1_024)
    seed: int = Field(default=0, ge=0)

    @field_validator("tokenizer")
    @classmethod
    def _known_tokenizer(cls, value: str) -> str:
        # Seven digits: more than any corpus fills, and a size that the trainer can still allocate.
        if value.startswith("bpe:") and not re.fullmatch(r"bpe:[0-9]{1,7}", value):
            raise ValueError("use bpe:SIZE (as bpe:4096), bytes, or the path of a tokenizer.json")
        return value

    @property
    def bpe_size(self) -> int:
        """Ids of the BPE to train."""
        return int(self.tokenizer.removeprefix("bpe:"))

    @property
    def source_dir(self) -> Path | None:
        """The source directory, or None for the installed packages."""
        return None if self.source == INSTALLED else Path(self.source)

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json to use, or None when one is trained or bytes are used."""
        return None if self.tokenizer == "bytes" or self.tokenizer.startswith("bpe:") else Path(self.tokenizer)

    def canonical(self) -> dict[str, Any]:
        """For build key and manifest: no machine's paths, only the source's own name."""
        values = self.model_dump(mode="json")
        directory = self.source_dir
        values["source"] = INSTALLED if directory is None else _name(directory.resolve())
        if self.tokenizer_path is not None:
            values["tokenizer"] = _name(self.tokenizer_path)
        return values


def _name(path: Path) -> str:
    """The last part of `path`, as UTF-8 can hold it: a manifest with anything else could not be read again."""
    return path.name.encode("utf-8", "replace").decode()


def validated(model: type[M], values: dict[str, Any], where: str) -> M:
    """`model(**values)`, with pydantic's complaints turned into a user error."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(str(part) for part in e['loc']) or where} = {e['input']!r}: {e['msg']}" for e in error.errors()
        )
        raise UserError(f"{where}: {details}") from error
