"""The bench of public projects: what it measures, keeps, and writes into the documentation."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from bench import processor_clock
from bench.projects import PROJECTS, SMALL, Project, __main__, passes
from bench.projects.table import BEGIN, END, lines, with_table
from bench.results import Results, read

SMALL_ONE = "GIN 10d, glow"
LEFT = "GIN 10d, gin"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor_clock, "_quick", True)


def cheap(name: str) -> Project:
    """A project at test size."""
    project = PROJECTS[name]
    return replace(project, build=lambda sizes: project.build(SMALL), batch=8)


def test_every_mode_of_a_flow_that_is_replaced_and_nothing_of_others() -> None:
    rows = list(__main__.measured(cheap(SMALL_ONE), 0.0))
    assert {(row.mode, row.provider) for row in rows} == {
        (mode, name) for mode in __main__.MODES for name in ("original", "glf_fast")
    }
    assert all(row.median > 0 and row.info["into"]["CouplingFlow"] == 1 for row in rows)
    assert not list(__main__.measured(cheap(LEFT), 0.0))


def test_no_training_where_the_flow_was_fused_in_eval_mode() -> None:
    rows = __main__.measured(cheap("nessai RealNVP, MLP, in its own class, eval"), 0.0)
    assert {row.mode for row in rows} == {"log_prob", "sample"}


def test_a_flow_that_should_be_replaced_and_is_not_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="is not replaced"):
        list(__main__.measured(replace(cheap(LEFT), why=""), 0.0))


def test_a_wrong_flow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(flow: nn.Module) -> object:
        report = true(flow)
        next(p for p in flow.parameters() if p.requires_grad).data.add_(1.0)
        return report

    true = passes.accelerate
    monkeypatch.setattr(passes, "accelerate", spoil)
    with pytest.raises(RuntimeError, match="has another log_prob"):
        list(__main__.measured(cheap(SMALL_ONE), 0.0))


def test_results_are_kept_and_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(__main__, "DROP_IN", tmp_path / "drop-in.md")
    monkeypatch.setitem(PROJECTS, SMALL_ONE, cheap(SMALL_ONE))
    (tmp_path / "drop-in.md").write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["", "--keep", "here", "--docs", "--projects", SMALL_ONE, LEFT, "--seconds", "0"])
    __main__.main()
    found = read(tmp_path / "results" / "here" / "projects.json")
    assert not found.wrong and len(found.groups()) == len(__main__.MODES)
    page = (tmp_path / "drop-in.md").read_text()
    assert page.startswith("before\n") and page.endswith(f"{END}\nafter\n") and "stale" not in page
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {SMALL_ONE} |"))
    gains = [float(cell) for cell in row.split("|")[3:7]]
    assert all(gain > 0 for gain in gains)


def test_the_table_names_every_project_once_and_says_why_some_stay() -> None:
    whole = list(lines([]))
    for project in PROJECTS.values():
        (row,) = (line for line in whole if line.startswith(f"| {project.name} |"))
        assert not project.why or project.how or f"stays: {project.why}" in row
        assert row.count("|") == 8
    with pytest.raises(ValueError, match="no line"):
        with_table("no marks", list[Results]())
