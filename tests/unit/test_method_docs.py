"""docs/methods.md: its table is complete, and its example runs and does what its paper says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from homespun.errors import InvalidConfig
from homespun.learning import method as registry
from homespun.learning.method import defaults, method, names
from tests.unit.quadratics import Simulation, quadratics

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
ROWS = {
    row[0].strip("` "): row
    for line in PAGE.splitlines()
    if line.startswith("| `") and len(row := line.strip("| ").split("|")) == 6
}
SERVER = {"server", "server_settings"}


def test_every_method_is_in_the_table():
    assert sorted(ROWS) == sorted(names())


@pytest.mark.parametrize("name", names())
def test_the_table_names_every_setting_and_its_default(name):
    cell = ROWS[name][5]
    told = dict(re.findall(r"`(\w+)`(?: ([\w.]+))?", cell))
    expected = defaults(name)
    if "*server*" in cell:
        assert {key: expected.pop(key) for key in SERVER} == {
            "server": "FedAvg",
            "server_settings": {},
        }
    assert told.keys() == expected.keys()
    for key, value in expected.items():
        assert told[key] == (value if isinstance(value, str) else f"{value:g}")


@pytest.mark.parametrize("name", names())
def test_the_table_says_who_needs_each_update_and_who_keeps_something(name):
    built, row = method(name), ROWS[name]
    assert ("by itself" in row[3]) == (built.combine is not None)
    assert bool(row[4].strip()) == (built.client_begin is not None)


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    short, whole = BLOCKS
    told: dict[str, object] = {}
    exec(short, told)
    assert told["ours"].name == "FedProx"  # type: ignore[attr-defined]
    assert len(whole.splitlines()) < 100
    exec(whole, {})
    with pytest.raises(InvalidConfig, match="epsilon"):
        method("FedExP", {"epsilon": 0.0})

    # Updates at right angles and of equal length u: |mean|^2 = u^2 / m, so the step is m / 2 times the mean.
    problem = quadratics(
        m=8, d=8, curvature=np.stack([np.eye(8)] * 8), optimum=3.0 * np.eye(8), steps=2
    )
    exp = Simulation(method("FedExP", {"epsilon": 1e-12}), problem, np.zeros(8)).rounds(1)
    avg = Simulation(method("FedAvg", {"weights": "equal"}), problem, np.zeros(8)).rounds(1)
    np.testing.assert_allclose(exp, 4 * avg, rtol=1e-9)
    # Where all agree it is FedAvg.
    problem.optimum = np.ones((8, 8))
    exp = Simulation(method("FedExP"), problem, np.zeros(8)).rounds(1)
    avg = Simulation(method("FedAvg"), problem, np.zeros(8)).rounds(1)
    np.testing.assert_allclose(exp, avg, rtol=1e-12)
