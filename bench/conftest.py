"""Options of `pytest bench`, and what its JSON says; warnings of other people's libraries are not errors here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import machine, processor_clock


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="time each pass once or so: only to see that everything runs")
    parser.addoption(
        "--long",
        action="store_true",
        help="also several processes at once, and sbi's NPE on two moons: minutes for each",
    )


def pytest_configure(config: pytest.Config) -> None:
    if torch.get_num_threads() != processor_clock.THREADS:  # after the call itself torch.linalg is wrong: docs/traps.md
        torch.set_num_threads(processor_clock.THREADS)
    if config.getoption("--quick"):
        processor_clock.quick()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
        item.add_marker(pytest.mark.timeout(3600 if config.getoption("--long") else 900))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """pytest-benchmark's own, without the computer's name, and ours."""
    for private in ("node", "release"):
        machine_info.pop(private, None)
    machine_info |= machine.about() | ({"quick": True} if config.getoption("--quick") else {})


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add the rows without a time and their reasons: failed and skipped tests."""
    found: dict[str, list[str]] = {}
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    reports = terminal.stats
    for report in (*reports.get("failed", ()), *reports.get("error", ()), *reports.get("skipped", ())):
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else str(report.longrepr[2] if report.skipped else report.longrepr)
        row = report.nodeid.partition("[")[2].removesuffix("]")
        found.setdefault(reason.splitlines()[0].removeprefix("Skipped: "), []).append(row)
    output_json["wrong"] = [f"{', '.join(tests)}: {reason}" for reason, tests in found.items()]
