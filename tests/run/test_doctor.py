"""The doctor looks at everything, says why something is off, and never falls ill itself."""

import io
import sys

import pytest
import torch
from rich.console import Console

from attention.core import BACKENDS
from moe.experts import MATMULS
from run import doctor as room
from run.__main__ import main
from run.doctor import Finding, doctor, show
from run.environment import machine


def test_every_backend_and_package_is_listed_once_with_a_detail() -> None:
    findings = doctor()
    places = [(finding.part, finding.name) for finding in findings]
    assert len(set(places)) == len(places)
    expected = {("attention", name) for name in BACKENDS} | {("experts", name) for name in MATMULS}
    expected |= {("packages", name) for name in room.BASE} | {("optional", name) for name in room.OPTIONAL}
    assert expected <= set(places)
    assert all(finding.detail for finding in findings)
    assert all(finding.is_on for finding in findings if finding.part == "packages")


def test_the_processor_is_the_one_that_a_run_records() -> None:
    (detail,) = (finding.detail for finding in doctor() if finding.name == "processor")
    name = machine(torch.device("cpu")).rpartition(", ")[0]
    assert name and detail.startswith(f"{name}, ")


def test_what_is_not_there_is_off_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> str:
        raise room.PackageNotFoundError(name)

    monkeypatch.setattr(room, "version", nowhere)
    packages = [finding for finding in doctor() if finding.part == "packages"]
    assert packages and all(not finding.is_on and "pip install" in finding.detail for finding in packages)


def test_a_part_that_cannot_be_loaded_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {finding.part for finding in doctor()}
    monkeypatch.setitem(sys.modules, "moe.experts", None)
    monkeypatch.delattr("moe.experts", raising=False)
    findings = doctor()
    assert {finding.part for finding in findings} == whole
    (experts,) = (finding for finding in findings if finding.part == "experts")
    assert not experts.is_on and "experts" in experts.detail


def test_the_table_shows_every_finding_unabridged() -> None:
    findings = [Finding("a", "one", True, "fine"), Finding("b", "two", False, "needs x[gpu] " + "and more " * 30)]
    console = Console(file=io.StringIO())
    show(findings, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(word in text for word in ("one", "fine", "two", "off", "x[gpu]"))
    assert text.count("and") == 30 == text.count("more")


def test_the_command_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "sdpa" in capsys.readouterr().out
