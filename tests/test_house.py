"""Rules of the house that a linter does not know. Files are read with `ast`."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "internvl"
FILES = sorted(PACKAGE.rglob("*.py"))
MAY_PRINT = ("cli", "__main__")
"""Parts of the package that print."""

Check = Callable[[ast.Module], Iterator[int]]

# Modules that somebody waits for before anything can happen: a wrong key must not cost the seconds
# that torch takes to import.
LIGHT = (
    *("__init__", "cli", "config", "zoo", "log"),
    *("compute.doctor", "launch.launchers", "report.results.compare"),
)
HEAVY = ("torch", "transformers", "peft")


def prints(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print":
            yield node.lineno


def bare_excepts(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno


def patches(tree: ast.Module) -> Iterator[int]:
    """Assignments to, deletions of, and setattr on attributes of what a file imported."""
    foreign = set(_foreign_names(tree))
    for node in ast.walk(tree):
        stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
        if stored and _root(node) in foreign:
            yield node.lineno
        is_setattr = isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setattr"
        if is_setattr and node.args and _root(node.args[0]) in foreign:
            yield node.lineno


def _foreign_names(tree: ast.Module) -> Iterator[str]:
    """Names that a file binds to something imported from outside the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] != "internvl":
                    yield alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "internvl":
            for alias in node.names:
                yield alias.asname or alias.name


def _root(node: ast.AST) -> str | None:
    """`a` of `a.b.c`; None when the expression does not start with a name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def remote_code(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.value.lineno


def unsafe_loads(tree: ast.Module) -> Iterator[int]:
    """Calls of torch.load that may run code from the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if safe.get("weights_only") != "True":
                yield node.lineno


def unannotated(tree: ast.Module) -> Iterator[int]:
    """Public functions and methods with a parameter or result without a type."""
    methods = {
        function
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for function in owner.body
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        private = node.name.startswith("_") and not node.name.endswith("__")
        static = any(ast.unparse(line) == "staticmethod" for line in node.decorator_list)
        arguments = [*node.args.posonlyargs, *node.args.args]
        arguments = arguments[1:] if node in methods and not static else arguments
        arguments += [*node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        typed = all(argument is None or argument.annotation for argument in arguments)
        if not private and not (typed and node.returns):
            yield node.lineno


CHECKS: tuple[tuple[Check, str], ...] = (
    (prints, "def f():\n    print('hello')"),
    (bare_excepts, "try:\n    f()\nexcept:\n    pass"),
    (patches, "import torch\ntorch.nn.Linear.forward = f"),
    (patches, "from torch.nn import Linear\nLinear.forward = f"),
    (patches, "import transformers.models as m\nsetattr(m.llama, 'x', f)"),
    (patches, "import torch\nwith f() as torch.x:\n    pass"),
    (remote_code, "load(x, trust_remote_code=True)"),
    (remote_code, "load(x, trust_remote_code=flag)"),
    (unsafe_loads, "torch.load(x)"),
    (unsafe_loads, "torch.load(x, weights_only=False)"),
    (unannotated, "def f(x) -> int: ..."),
    (unannotated, "def f(x: int): ..."),
    (unannotated, "class A:\n    def f(self, *rest) -> int: ..."),
)

FINE = """
import torch
from internvl import log
def f(x: int, *rest: int, key: str = "", **more: int) -> int: ...
class A:
    def __init__(self, x: int) -> None:
        self.x = x
        log.y = x
    @staticmethod
    def g(x: int) -> int: ...
def _private(x): ...
x = torch.load(path, map_location="cpu", weights_only=True)
load(x, trust_remote_code=False)
try:
    f()
except ValueError:
    pass
"""


# In the order of the list: a set of functions has another one in every worker process.
@pytest.mark.parametrize(
    "check", dict.fromkeys(check for check, _ in CHECKS), ids=lambda check: check.__name__
)
def test_the_package_keeps_the_rule(check: Check) -> None:
    found = [
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in FILES
        if not (check is prints and file.relative_to(PACKAGE).with_suffix("").parts[0] in MAY_PRINT)
        for line in check(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(("check", "source"), CHECKS)
def test_a_broken_rule_is_seen(check: Check, source: str) -> None:
    assert len(list(check(ast.parse(source)))) == 1


def test_good_code_is_left_alone() -> None:
    for check, _ in CHECKS:
        assert list(check(ast.parse(FINE))) == []


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_import_heavy_libraries(module: str) -> None:
    name = "internvl" if module == "__init__" else f"internvl.{module}"
    code = f"import sys, {name}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_importing_the_package_imports_no_library() -> None:
    """`import internvl` is fast because its names are resolved when used."""
    code = "import sys, internvl; print([m for m in sys.modules if m in ('numpy', 'PIL', 'yaml')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
