"""Docstrings of the fields of a section, for the command line's help."""

import ast
import functools
import inspect
import sys
from dataclasses import is_dataclass
from itertools import pairwise


def field_docs(section: type) -> dict[str, str]:
    """Returns field -> its docstring on one line, inherited fields included."""
    texts: dict[str, str] = {}
    # Base first, so that a subclass's text for a field replaces the inherited one.
    for base in reversed(section.__mro__):
        if is_dataclass(base):
            texts |= _module_docs(base.__module__)[base.__name__]
    return texts


@functools.cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    """Parses a module; returns class -> field -> docstring."""
    # From the source: Python drops the string under an assignment. A whole file per parse: to find
    # one class, inspect parses the file again, which for all sections takes a fifth of a second.
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: _field_texts(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _field_texts(section: ast.ClassDef) -> dict[str, str]:
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(section.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
