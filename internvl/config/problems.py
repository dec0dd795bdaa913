"""pydantic's errors as sentences."""

import re
from typing import Any


def sentence(error: Any) -> str:
    """What is wrong with a value, from an entry of pydantic's `errors()`."""
    where = ".".join(str(part) for part in error["loc"] if part != "dataclass")
    if error["type"] == "missing":
        return f"{where}: missing; it has no default"
    # Pydantic names the type it tried as well, where a value may have several.
    where = re.split(r"\.(?=[\w-]+\[)|\.(?:str|int|float|bool)$", where)[0]
    found = error.get("input")
    if error["type"] == "tuple_type":
        remedy = f"write [{found}]" if isinstance(found, str | int | float) else "begin with - or ["
        return f"{where}: must be a list, not {found!r}; {remedy}"
    said = "input should be a path" if error["type"] == "path_type" else error["msg"]
    return f"{where}: {said[0].lower()}{said[1:]}, not {found!r}"
