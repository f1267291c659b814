"""What `fathom serve` can be told: one frozen config, validated where the fields live.

Not for argument parsing (__main__.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from apps.eval.serve.guard import is_loopback
from libs.flags.errors import UserError

MIN_TOKEN_CHARACTERS = 16


class ServeConfig(BaseModel):
    """Settings of one server. Sizes in bytes, times in seconds.

    max_batch: requests computed together. max_tokens: of one request, prompt and generated. queue: requests that may
    wait besides. timeout: of one request, from admission to its last token. grace: for open requests after a signal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    checkpoint: Path
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    token_file: Path | None = None
    name: str | None = Field(default=None, min_length=1, max_length=80)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_batch: int = Field(default=8, ge=1)
    max_tokens: int = Field(default=4096, ge=2)
    kv_blocks: int | None = Field(default=None, ge=1)
    draft_length: int = Field(default=0, ge=0)
    queue: int = Field(default=64, ge=0)
    max_body: int = Field(default=1 << 20, ge=1)
    max_header: int = Field(default=16 << 10, ge=1024)
    max_connections: int = Field(default=256, ge=1)
    body_timeout: float = Field(default=30.0, gt=0)
    timeout: float = Field(default=600.0, gt=0)
    grace: float = Field(default=30.0, ge=0)
    token: str | None = Field(default=None, repr=False, exclude=True)

    @model_validator(mode="after")
    def _not_open_to_all(self) -> Self:
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} is open to other machines, and anyone there could use the model: "
                "give --token-file FILE, or serve on 127.0.0.1"
            )
        return self

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Validate, and read the token file. Raises UserError naming the option, its value and what is wrong."""
        path = values.get("token_file")
        try:
            return cls.model_validate(values | {"token": None if path is None else read_token(path)})
        except ValidationError as error:
            raise UserError("\n".join(_told(line) for line in error.errors())) from error


def read_token(path: Path) -> str:
    """The token in a file: one line of printable ASCII. Raises UserError: unreadable, too short, or anything else."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {path} cannot be read: {error}") from error
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isprintable() or " " in token:
        raise UserError(
            f"--token-file {path} must hold one token of {MIN_TOKEN_CHARACTERS} or more printable characters "
            "without blanks, such as `openssl rand -hex 32` writes"
        )
    return token


def _told(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return str(message)
    return f"--{str(error['loc'][0]).replace('_', '-')}: {message} (given: {error['input']!r})"
