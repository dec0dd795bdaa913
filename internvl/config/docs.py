"""The text under a field of a section, for the command line's help."""

import ast
import functools
import inspect
import sys
from dataclasses import is_dataclass
from itertools import pairwise


def field_docs(section: type) -> dict[str, str]:
    """Returns field -> its text, on one line; inherited fields included."""
    texts: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if is_dataclass(base):
            texts |= _module_docs(base.__module__)[base.__name__]
    return texts


@functools.cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    """Returns class -> field -> text. Python keeps none of a field, so the source is read."""
    # A file at a time: to find the source of one class, inspect parses the whole file again, which
    # for all sections would take a fifth of a second of every command.
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: _texts(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _texts(section: ast.ClassDef) -> dict[str, str]:
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(section.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
