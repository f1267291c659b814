"""A file that holds one record, read whole or refused in words.

Not for what the records say (results.py, bench/), nor for logs, which are read line by line (libs.flags.runlog).
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from libs.flags.errors import UserError

RecordT = TypeVar("RecordT", bound=BaseModel)


def read_record(path: Path, model: type[RecordT], what: str, *, hint: str = "") -> RecordT:
    """The record in the JSON file `path`. what: it in words. hint: what to do when it is not there or no such thing.

    Raises:
        UserError: unreadable, or not what `model` says; with the place of the first fault.
    """
    tail = f"; {hint}" if hint else ""
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}{tail}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise UserError(f"{path} is no {what}: {where}: {fault['msg']}{tail}") from error
    except (KeyError, ArithmeticError) as error:  # of a model that works out again what the file states
        raise UserError(f"{path} is no {what}: what it states cannot be worked out: {error!r}{tail}") from error
