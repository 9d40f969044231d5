"""Asynchronous runs: synchronous ones where time does not differ, the events of a small clock by hand, and resume."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

import homespun
from homespun.errors import Conflict, HomespunError, InvalidConfig, InvalidInput
from homespun.learning.method import PLAIN
from homespun.simulation.arena import Arena
from homespun.simulation.asynchronous import Clock, Durations
from homespun.simulation.batches import batches
from homespun.simulation.checkpoints import Checkpoints
from homespun.simulation.cohort.engine import CohortEngine
from homespun.simulation.participation import Participation, Traces
from tests.unit.simulated import data, task
from tests.unit.test_simulation_simulate import bits, flat, plain, run

CONSTANT = Durations(seconds=7.0, spread=0.0)
BUFFERED = {"method": "FedBuff", "method_settings": {"size": 2}, "durations": Durations(jitter=0.5)}


def clock(lengths, size, concurrency, max_staleness=100, seed=0, **draw):
    n = len(lengths)
    return Clock(
        draw=Participation(num_clients=n, seed=seed, cohort_size=concurrency, **draw),
        durations=Durations(measured=lengths, spread=0.0, slot_seconds=10.0),
        examples=np.full(n, 3),
        concurrency=concurrency,
        size=size,
        max_staleness=max_staleness,
    )


def update(made, on, model, client, number):
    """[d]: what a client's training from `model` changes, by the engine, in the order of batches of round `number`."""
    steps = batches(
        on.offsets,
        np.array([client]),
        batch_size=made.batch_size,
        local_epochs=made.local_epochs,
        max_rows=made.max_rows,
        seed=3,
        round_number=number,
    )
    return CohortEngine(made, on, strategy="reference").train(model, steps, PLAIN)[0].update[0]


@pytest.mark.parametrize("weights", [{"weights": "equal"}, {"weights": "examples"}])
@pytest.mark.parametrize("server", ["FedAvg", "FedAdam"])
def test_alike_in_time_it_is_the_synchronous_run_to_the_last_bit(weights, server):
    max_weight = 8 if weights["weights"] == "examples" else 0
    settings = {"proximal": 0.1, "server": server, **weights}
    words = {"cohort": 5, "rounds": 6, "max_weight": max_weight, "durations": CONSTANT}
    synchronous = run(method="FedProx", method_settings=settings, **words)
    buffered = {"size": 5, "method": "FedProx", "settings": settings}
    asynchronous = run(method="FedBuff", method_settings=buffered, **words)
    assert bits(asynchronous) == bits(synchronous)
    for one, other in zip(asynchronous.history, synchronous.history, strict=True):
        assert (one.loss, one.num_steps) == (other.loss, other.num_steps)
        assert one.virtual_seconds == other.virtual_seconds == 7.0 * one.round
        assert (one.staleness, one.most_stale, other.staleness) == (0.0, 0, None)


def test_one_at_a_time_is_one_client_after_another():
    made, on = task(), data()
    result = run(
        made=made, on=on, method="FedBuff", method_settings={"size": 1}, cohort=1, rounds=6
    )
    draw = Participation(
        num_clients=12, seed=3, cohort_size=1, weights=(on.num_rows > 0).astype(float)
    )
    model, seconds = CohortEngine(made, on, strategy="reference").initial(), []
    for number in range(1, 7):
        (client,) = draw.draw(1, number, 0).clients
        model = model + update(made, on, model, client, number)
        seconds.append(Durations().of(np.array([client]), np.array([0]), 3, number)[0])
    np.testing.assert_allclose(flat(result), model.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose([r.virtual_seconds for r in result.history], np.cumsum(seconds))


def test_the_clock_by_hand():
    """Two at work, every report is a step: client 0 takes 1 s, client 1 takes 2.5 s, and nobody else is there."""
    ticking = clock([1.0, 2.5], size=1, concurrency=2)
    # 0 reports at 1, 2, then 1 at 2.5, 0 at 3, 4, then 0 and 1 together at 5
    steps = [ticking.step(number) for number in range(1, 8)]
    assert [step.time for step in steps] == [1, 2, 2.5, 3, 4, 5, 5]
    assert [step.members[0].client for step in steps[:5]] == [0, 0, 1, 0, 0]
    assert {step.members[0].client for step in steps[5:]} == {0, 1}
    assert [step.members[0].staleness for step in steps[:5]] == [0, 0, 2, 1, 0]
    began = clock([1.0, 2.5], size=1, concurrency=2).began
    assert [[(s.client, s.step) for s in sorted(began(v), key=lambda s: s.client)] for v in range(4)] == [
        [(0, 1), (1, 3)], [(0, 2)], [(0, 4)], [(1, 7 if steps[6].members[0].client else 6)],
    ]  # fmt: skip


def test_stale_updates_have_the_weights_of_a_hand_computed_case():
    """The clock of above, three steps: x1 = x0 + u0(x0), x2 = x1 + u0(x1), and client 1 comes with u1(x0)."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(6, 6)).astype(np.float32)
    y = np.array([0, 1, 2, 1, 0, 2], np.int32)
    on, made = Arena({"x": x, "y": y}, np.array([0, 3, 6])), task()
    result = run(
        made=made,
        on=on,
        cohort=2,
        rounds=3,
        method="FedBuff",
        method_settings={"size": 1, "divide_by": "size"},
        durations=Durations(measured=[1.0, 2.5], spread=0.0),
    )
    start = CohortEngine(made, on, strategy="reference").initial()
    first = start + update(made, on, start, 0, 1)
    second = first + update(made, on, first, 0, 2)
    third = second + update(made, on, start, 1, 1) / sqrt(3)
    np.testing.assert_allclose(flat(result), third.numpy(), rtol=0, atol=2e-5)
    assert [r.staleness for r in result.history] == [0, 0, 2]
    assert result.history[2].weight == pytest.approx(1 / sqrt(3), abs=1e-5)
    assert [r.num_clients for r in result.history] == [1, 1, 1]


def test_every_step_is_the_weighted_mean_of_updates_of_the_models_they_began_from():
    made, on, durations = task(), data(), Durations(jitter=0.5)
    settings = {"size": 3, "max_weight": 5}
    result = run(
        made=made, on=on, rounds=9, method="FedBuff", method_settings=settings, durations=durations
    )
    ticking = Clock(
        draw=Participation(
            num_clients=12, seed=3, cohort_size=5, weights=(on.num_rows > 0).astype(float)
        ),
        durations=durations,
        examples=made.num_examples(on.num_rows),
        concurrency=5,
        size=3,
        max_staleness=100,
    )
    models = [CohortEngine(made, on, strategy="reference").initial()]
    mixed = 0
    for number in range(1, 10):
        members = ticking.step(number).members
        mixed += len({start.version for start in members}) > 1
        weights = [min(s.examples, 5) / 5 / sqrt(1 + s.staleness) for s in members]
        updates = [update(made, on, models[s.version], s.client, s.version + 1) for s in members]
        mean = sum(w * u for w, u in zip(weights, updates, strict=True)) / sum(weights)
        models.append(models[-1] + mean)
    assert mixed > 3
    np.testing.assert_allclose(flat(result), models[-1].numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_everybody_trains_once_from_a_model_and_counts_once(size):
    ticking = clock(np.linspace(1, 9, 20), size=size, concurrency=6, drop_out=0.3)
    promised, seen = [], []
    for number in range(1, 60):
        began = ticking.began(number - 1)
        assert len({start.client for start in began}) == len(began)
        promised += [(start.step, start.client) for start in began]
        step = ticking.step(number)
        assert len(step.members) == size
        assert all(start.staleness >= 0 for start in step.members)
        seen += [(number, start.client) for start in step.members]
    assert sorted(seen) == sorted(p for p in promised if p[0] < 60)


def test_who_falls_too_far_behind_stops_and_gives_its_place_away():
    lengths = [1.0, 1.0, 3.5, 4.5, 1000.0]
    draws = [clock(lengths, 1, 2, max_staleness=limit, seed=1) for limit in (3, 10**6)]
    ends = []
    for ticking, slow in zip(draws, (False, True), strict=True):
        steps = [ticking.step(number) for number in range(1, 1500)]
        assert any(s.members[0].client == 4 for s in steps) == slow
        assert max(s.members[0].staleness for s in steps) in (range(100, 1000) if slow else (3,))
        ends.append(steps[-1].time)
    assert ends[0] < 0.9 * ends[1]  # nobody holds a place for 1,000 seconds


def test_nobody_begins_while_nobody_is_available():
    slots = np.zeros((4, 3), np.bool_)
    slots[:, 1] = True  # from second 10 to 20 of every 30
    ticking = clock([4.0] * 4, size=4, concurrency=4, availability=Traces(slots))
    assert [ticking.step(number).time for number in range(1, 6)] == [14, 18, 22, 44, 48]
    never = clock([4.0] * 4, size=4, concurrency=4, availability=Traces(slots & False))
    with pytest.raises(InvalidInput, match="nobody can begin"):
        never.step(1)


def test_everybody_begins_when_it_is_available():
    slots = np.array([[True, False], [False, True]] * 10)
    lengths = np.linspace(2.6, 3.4, 20)
    ticking = clock(lengths, size=1, concurrency=6, availability=Traces(slots))
    for number in range(1, 200):
        step = ticking.step(number)
        (start,) = step.members
        began = step.time - lengths[start.client] + 1e-9
        assert start.client % 2 == int(began // 10) % 2


def test_who_is_lost_holds_a_place_and_reports_nothing():
    lost = np.array([1.0, 0.0] * 10)
    times = []
    for chances in (lost, np.zeros(20)):
        ticking = clock([5.0] * 20, size=2, concurrency=4, drop_out=chances)
        steps = [ticking.step(number) for number in range(1, 80)]
        seen = {start.client for step in steps for start in step.members}
        assert seen == set(np.flatnonzero(chances < 1).tolist())
        times.append(steps[-1].time)
    assert 1.5 < times[0] / times[1] < 2.5  # half of the places bring nothing


def test_durations_are_what_they_say():
    clients = np.arange(20_000)
    drawn = Durations(seconds=10.0, per_example=2.0, spread=0.5, jitter=0.2)
    first, again = (drawn.of(clients, np.full(20_000, 5), 1, number) for number in (1, 2))
    assert np.median(first) == pytest.approx(20.0, rel=0.02)
    logs = np.log(first), np.log(again)
    assert np.std(logs[0]) == pytest.approx(sqrt(0.25 + 0.04), rel=0.02)
    assert np.cov(*logs)[0, 1] == pytest.approx(0.25, rel=0.05)  # what a client keeps
    np.testing.assert_array_equal(first, drawn.of(clients, np.full(20_000, 5), 1, 1))
    np.testing.assert_array_equal(drawn.of(clients[7:9], np.full(2, 5), 1, 1), first[7:9])


def test_the_same_seed_gives_the_same_bits_whatever_the_shards():
    first, again, other = (
        run(**BUFFERED, rounds=9),
        run(**BUFFERED, rounds=9),
        run(**BUFFERED, seed=4),
    )
    assert bits(first) == bits(again)
    assert [plain(r) for r in first.history] == [plain(r) for r in again.history]
    assert bits(first) != bits(other)
    assert max(r.most_stale for r in first.history) > 1
    cut = run(**BUFFERED, rounds=9, shards=3)
    np.testing.assert_allclose(flat(cut), flat(first), rtol=0, atol=1e-5)
    times = [r.virtual_seconds for r in first.history]
    assert times == sorted(times)


def test_workers_and_strategies_give_the_same():
    words = {**BUFFERED, "rounds": 4, "shards": 2}
    here = run(**words, strategy="stacked")
    there = homespun.simulate(
        task, data(), cohort=5, seed=3, progress=False, strategy="stacked", workers=2, **words
    )
    assert bits(there) == bits(here)
    np.testing.assert_allclose(flat(here), flat(run(**words)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("server", ["FedAvg", "FedAdam"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path, server):
    settings = {"size": 2, "settings": {"server": server}, "method": "FedProx"}
    words = {**BUFFERED, "method_settings": settings, "evaluate_on": data(3, seed=8)}
    whole = run(**words, rounds=12)
    run(**words, rounds=5, directory=tmp_path)
    pending = Checkpoints(tmp_path / "checkpoints").load(5).server
    assert sum(name.startswith("pending/") for name in pending) > 1
    resumed = run(**words, rounds=12, directory=tmp_path, resume=True)
    assert bits(resumed) == bits(whole)
    assert [plain(r) for r in resumed.history] == [plain(r) for r in whole.history]
    with pytest.raises(Conflict, match="another durations"):
        run(**{**words, "durations": CONSTANT}, rounds=13, directory=tmp_path, resume=True)


def test_clipping_bounds_what_each_update_moves():
    result = run(**BUFFERED, rounds=1, clip_norm=0.01)
    before = flat(run(rounds=1, cohort=1, made=task(learning_rate=0.0)))
    assert 0 < np.linalg.norm(flat(result) - before) <= 0.01 * (1 + 1e-5)
    assert result.history[0].clipped == 1.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"method_settings": {"size": 0}}, "size"),
        ({"method_settings": {"size": 1.5}}, "whole number"),
        ({"method_settings": {"buffer": 3}}, "no setting"),
        ({"method_settings": {"size": 12}}, "larger than the clients"),
        ({"method_settings": {"method": "SCAFFOLD"}}, "cannot buffer"),
        ({"aggregation": "fixed-point", "clip_norm": 1.0}, "floats"),
        ({"participation": lambda number: np.array([1])}, "Participation"),
        ({"durations": Durations(measured=[1.0])}, "measured duration"),
    ],
)
def test_what_cannot_run_asynchronously_is_refused(words, said):
    with pytest.raises(HomespunError, match=said):
        run(**{**BUFFERED, **words})


@pytest.mark.parametrize(
    "settings", [{"seconds": 0}, {"jitter": -1}, {"spread": float("nan")}, {"measured": [0.0]}]
)
def test_durations_that_make_no_sense_are_refused(settings):
    with pytest.raises(InvalidConfig):
        Durations(**settings)
