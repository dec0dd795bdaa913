"""An error in OpenAI's shape, which its clients turn into typed exceptions."""

from collections.abc import Sequence
from typing import Any

from internvl.errors import UserError

BUSY, UNAVAILABLE = 429, 503


class ApiError(UserError):
    """A request that is refused, or that failed: HTTP status, sentence, and the field at fault."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        """
        Args:
            param: name of the field that is wrong.
            code: a word for programs, such as model_not_found.
            retry_s: seconds after which a client should ask again.
        """
        # Its text is the whole message, as of every UserError: it says what to do.
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_s = retry_s

    @property
    def body(self) -> dict[str, Any]:
        """Returns the response's JSON object."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Returns the response's headers."""
        # Clients of OpenAI wait as long before they ask again.
        return {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}


_TYPES = {
    # Clients choose their exception by the status; people read the word.
    401: "authentication_error",
    BUSY: "rate_limit_error",
    500: "server_error",
    UNAVAILABLE: "server_error",
}
"""HTTP status -> OpenAI's word for it."""


def unavailable(reason: str, retry_s: int = 5) -> ApiError:
    """Returns the error of a server that cannot answer now."""
    return ApiError(reason, status=UNAVAILABLE, code="unavailable", retry_s=retry_s)


def model_not_found(name: str, names: Sequence[str]) -> ApiError:
    """Returns the error of a model that this server does not have."""
    return ApiError(
        f"there is no model {name!r} here; there is {', '.join(names)}",
        status=404,
        param="model",
        code="model_not_found",
    )
