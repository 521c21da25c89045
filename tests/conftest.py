"""Which tests run by default, and the figures that tests measure but do not assert."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every machine, however slow or busy it is.
settings.register_profile("anywhere", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("anywhere")

OPT_IN = {
    "gpu": "needs an NVIDIA GPU: run `pytest -m gpu` on a machine that has one",
    "slow": "the full matrix takes half an hour or more: run `pytest -m slow`",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the tests of an opt-in marker unless the -m expression names that marker."""
    requested = config.getoption("markexpr")
    for item in items:
        for marker, reason in OPT_IN.items():
            if item.get_closest_marker(marker) and marker not in requested:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests recorded by ``record_property("measured", "... 0.2 s")``: timings are shown, not asserted."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    figures = [value for report in reports for name, value in report.user_properties if name == "measured"]
    if figures:
        terminalreporter.section("measured")
    for figure in figures:
        terminalreporter.write_line(str(figure))
