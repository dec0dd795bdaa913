"""pydantic's errors as sentences."""

import re
from typing import Any


def sentence(error: Any) -> str:
    """Returns the problem of a value as a sentence, from an entry of pydantic's `errors()`."""
    where = ".".join(str(key) for key in error["loc"] if key != "dataclass")
    if error["type"] == "missing":
        return f"{where}: missing; it has no default"
    # Pydantic names the type it tried as well, where a value may have several.
    where = re.split(r"\.(?=[\w-]+\[)|\.(?:str|int|float|bool)$", where)[0]
    value = error.get("input")
    if error["type"] == "tuple_type":
        remedy = f"write [{value}]" if isinstance(value, str | int | float) else "begin with - or ["
        return f"{where}: must be a list, not {value!r}; {remedy}"
    message = "input should be a path" if error["type"] == "path_type" else error["msg"]
    return f"{where}: {message[0].lower()}{message[1:]}, not {value!r}"
