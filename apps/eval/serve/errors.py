"""Errors a client can meet: a status, and a body in the shape of OpenAI's API.

Not for the errors of whoever starts the server: those are `UserError`s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """A refusal. status: of HTTP. code: a fixed word for programs. param: the field at fault, where it is one.

    headers: what the answer carries beside the body, such as Retry-After in seconds.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    @classmethod
    def invalid(cls, message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
        """400: the request is wrong and will stay wrong."""
        return cls(400, code, message, param=param)

    @classmethod
    def unavailable(cls, code: str, message: str, *, retry_after: int = 1) -> ApiError:
        """503: right, but not now."""
        return cls(503, code, message, headers={"Retry-After": str(retry_after)})

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)
