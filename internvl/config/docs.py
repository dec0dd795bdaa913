"""The text under a field of a section, for the command line's help."""

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from itertools import pairwise


def field_docs(section: type) -> dict[str, str]:
    """Returns field -> its text, on one line; inherited fields included."""
    texts: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if is_dataclass(base):
            # Python keeps no docstring of a field, so the source is read.
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            texts |= _texts(tree)
    return texts


def _texts(tree: ast.stmt) -> dict[str, str]:
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
