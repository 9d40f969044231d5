"""Who takes part: fair draws from whoever is available, the same whenever a round is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from homespun.errors import InvalidConfig, NotFound, ShapeMismatch, StorageFailure
from homespun.simulation.participation import DayNight, Participation, Traces


def shares(participation, rounds=2000):
    """How often each client was drawn, per round."""
    counts = np.zeros(participation.num_clients)
    for number in range(rounds):
        counts[participation.cohort(number).clients] += 1
    return counts / rounds


def test_a_cohort_is_uniform_and_without_replacement():
    draws = Participation(num_clients=40, seed=1, cohort_size=10)
    cohort = draws.cohort(7)
    assert cohort.clients.dtype == np.int64
    assert len(set(cohort.clients.tolist())) == 10
    assert not cohort.dropped.any()
    assert cohort.reporting.tolist() == cohort.clients.tolist()
    # each is drawn with probability 1/4: four standard deviations
    assert np.abs(shares(draws) - 0.25).max() < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_a_round_does_not_depend_on_the_rounds_before():
    draws = Participation(num_clients=40, seed=1, cohort_size=10, drop_out=0.5)
    later = draws.cohort(9)
    for number in range(9):
        draws.cohort(number)
    again = draws.cohort(9)
    assert later.clients.tolist() == again.clients.tolist()
    assert later.dropped.tolist() == again.dropped.tolist()
    assert later.clients.tolist() != draws.cohort(10).clients.tolist()


def test_a_fraction_is_of_all_clients():
    for fraction, expected in ((0.1, 4), (0.001, 1), (1.0, 40)):
        draws = Participation(num_clients=40, seed=1, fraction=fraction)
        assert len(draws.cohort(0).clients) == draws.wanted == expected


def test_weights_are_the_chances_of_a_draw():
    weights = np.array([1.0, 2.0, 3.0, 0.0])
    first = shares(Participation(num_clients=4, seed=1, cohort_size=1, weights=weights), 6000)
    assert first[3] == 0
    assert first[:3] == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.025)
    whole = Participation(num_clients=4, seed=1, cohort_size=4, weights=weights).cohort(0)
    assert sorted(whole.clients.tolist()) == [0, 1, 2]


def test_only_available_clients_are_drawn(tmp_path):
    slots = np.zeros((40, 2), np.bool_)
    slots[:5, 0] = True
    slots[20:, 1] = True
    np.save(tmp_path / "slots.npy", slots)
    traces = Traces.open(tmp_path / "slots.npy")
    for weights in (None, np.ones(40)):
        draws = Participation(
            num_clients=40, seed=1, cohort_size=10, availability=traces, rounds_per_slot=3,
            weights=weights,
        )  # fmt: skip
        for number in (0, 2, 6):  # too few: all of them
            assert sorted(draws.cohort(number).clients.tolist()) == [0, 1, 2, 3, 4]
        assert len(draws.cohort(3).clients) == 10
        assert draws.cohort(5).clients.min() >= 20
    nobody = Traces(np.zeros((40, 1), np.bool_))
    for weights in (None, np.ones(40)):
        draws = Participation(
            num_clients=40, seed=1, cohort_size=10, availability=nobody, weights=weights
        )
        assert draws.cohort(0).clients.shape == draws.cohort(0).reporting.shape == (0,)


def test_drop_outs_are_a_clients_own_and_over_selection_makes_up_for_them():
    chance = np.where(np.arange(40) < 20, 0.0, 0.5)
    draws = Participation(
        num_clients=40, seed=1, cohort_size=20, drop_out=chance, over_selection=1.5
    )
    dropped, drawn = np.zeros(40), np.zeros(40)
    for number in range(1000):
        cohort = draws.cohort(number)
        assert len(cohort.clients) == 30
        drawn[cohort.clients] += 1
        dropped[cohort.clients[cohort.dropped]] += 1
        survivors = cohort.clients[~cohort.dropped]
        assert cohort.reporting.tolist() == survivors[:20].tolist()
    assert dropped[:20].sum() == 0
    assert np.abs(dropped[20:] / drawn[20:] - 0.5).max() < 4 * (0.25 / 700) ** 0.5
    assert len(Participation(num_clients=40, seed=1, cohort_size=10, over_selection=1.1).cohort(0).clients) == 11  # fmt: skip  # noqa: E501


def test_a_population_names_the_arenas_clients():
    draws = Participation(num_clients=3, seed=1, cohort_size=3, population=np.array([5, 9, 70]))
    assert sorted(draws.cohort(0).clients.tolist()) == [5, 9, 70]


def test_phones_charge_at_night_in_their_own_time_zone():
    sky = DayNight(num_clients=20_000, seed=3, at_night=0.8, by_day=0.1, night=(22, 7))
    zones = sky.zones()
    counts = np.bincount(zones, minlength=24)
    assert ((counts - 20_000 / 24) ** 2 / (20_000 / 24)).sum() < 49.7  # 23 degrees, 0.999
    for slot in (0, 6, 7, 21, 22, 23, 31):
        found = sky.available(slot)
        local = (slot + zones) % 24
        night = (local >= 22) | (local < 7)
        assert found[night].mean() == pytest.approx(0.8, abs=0.03)
        assert found[~night].mean() == pytest.approx(0.1, abs=0.02)
    assert (sky.available(5) == sky.available(5)).all()
    assert (sky.available(5) != sky.available(29)).any()
    only = DayNight(num_clients=50, seed=3, time_zones=(0.0,) * 5 + (2.0,) + (0.0,) * 18)
    assert set(only.zones().tolist()) == {5}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, InvalidConfig),
        ({"cohort_size": 5, "fraction": 0.1}, InvalidConfig),
        ({"cohort_size": 41}, InvalidConfig),
        ({"cohort_size": 0}, InvalidConfig),
        ({"fraction": 1.5}, InvalidConfig),
        ({"cohort_size": 5, "drop_out": 1.5}, InvalidConfig),
        ({"cohort_size": 5, "drop_out": np.zeros(3)}, ShapeMismatch),
        ({"cohort_size": 5, "over_selection": 0.9}, InvalidConfig),
        ({"cohort_size": 5, "weights": np.zeros(40)}, InvalidConfig),
        ({"cohort_size": 5, "weights": np.full(40, np.nan)}, InvalidConfig),
        ({"cohort_size": 5, "weights": np.ones(39)}, ShapeMismatch),
        ({"cohort_size": 5, "availability": DayNight(num_clients=3, seed=1)}, ShapeMismatch),
        ({"cohort_size": 5, "rounds_per_slot": 0}, InvalidConfig),
    ],
)
def test_what_means_nothing_is_refused(settings, error):
    with pytest.raises(error):
        Participation(num_clients=40, seed=1, **settings)


def test_a_trace_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(NotFound, match="slots"):
        Traces.open(tmp_path / "slots.npy")
    (tmp_path / "slots.npy").write_bytes(b"no array")
    with pytest.raises(StorageFailure, match="slots"):
        Traces.open(tmp_path / "slots.npy")
    with pytest.raises(ShapeMismatch):
        Traces(np.zeros(3, np.bool_))
    for settings in ({"at_night": 2.0}, {"night": (22, 24)}, {"time_zones": (1.0,)}):
        with pytest.raises(InvalidConfig):
            DayNight(num_clients=3, seed=1, **settings)
