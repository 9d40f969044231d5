"""What the command line says about releases."""

from __future__ import annotations

import pytest

from homespun.cli.releases import describe_devices, describe_finding, find_release
from homespun.errors import InvalidInput, NotFound
from homespun.learning.evidence import Gate
from homespun.protocol.release import (
    Reported,
    finding,
)


def test_a_difference_in_points():
    found = finding("difference", Gate(-0.1, 0.1), Reported(num_devices=40, total=2.0, squares=0.1))
    words = describe_finding(found)
    assert words.startswith("difference +5.0 points (+")
    assert words.endswith("wanted above +0.0): pass")
    assert describe_devices(found) == "40 devices"


def test_seconds_and_failures_are_shown_as_they_are():
    gate = Gate(-0.1, 0.0, at_least=-0.05, worthwhile=0.0)
    slow = Reported(num_devices=30, total=-2.7, squares=0.243)
    fast = Reported(num_devices=30, total=-0.3, squares=0.003)
    found = finding("latency", gate, slow, fast)
    words = describe_finding(found)
    assert words.startswith("latency +80.0 ms (+")
    assert words.endswith("wanted below +50.0): fail")
    assert describe_devices(found) == "30 devices, 30 in control"


def test_nothing_yet():
    found = finding("failed", Gate(-1.0, 0.0, at_least=-0.5), Reported(), Reported())
    assert describe_finding(found) == (
        "failed nothing yet (-100.0 to +100.0, wanted below +50.0): open"
    )


class Client:
    """Two releases of one version, in two slots."""

    class Named:
        def __init__(self, release_id: str) -> None:
            self.version, self.release_id = "1.0", release_id

    def releases(self):
        return [self.Named("ab1"), self.Named("ab2")]

    def release(self, release_id):
        return release_id


def test_a_release_is_found_by_its_id_or_version():
    client = Client()
    assert find_release(client, "ab2") == "ab2"  # type: ignore[arg-type, comparison-overlap]
    for name in ("1.0", "ab"):
        with pytest.raises(InvalidInput, match="2 releases"):
            find_release(client, name)  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="2"):
        find_release(client, "2.0")  # type: ignore[arg-type]
