"""`homespun.simulate`: rounds give what their definition says, and a run that was cut off goes on to the same bits."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import homespun
from homespun.errors import (
    Conflict,
    HomespunError,
    InvalidConfig,
    InvalidInput,
    NumericFailure,
    StorageFailure,
)
from homespun.learning.contribution import ContributionCodec
from homespun.learning.method import PLAIN, Report, _registry, method
from homespun.plan.manifest import ClientOptimizer
from homespun.rng import derive_seed, stream
from homespun.simulation.batches import batches
from homespun.simulation.checkpoints import Checkpoints
from homespun.simulation.clients import ClientStore
from homespun.simulation.cohort.engine import CohortEngine
from homespun.simulation.cohort.results import Choice
from homespun.simulation.cohort.tuning import Tuning
from homespun.simulation.history import read_history
from homespun.simulation.participation import Participation, Traces
from homespun.simulation.stopping import EarlyStopping, Target
from tests.unit.simulated import data, task

METHODS = ("FedAvg", "FedAdam", "FedProx", "SCAFFOLD", "FedNova", "Ditto", "Median")


def run(*, made=None, on=None, **words):
    words = {
        "rounds": 4,
        "cohort": 5,
        "seed": 3,
        "progress": False,
        "strategy": "reference",
        **words,
    }
    return homespun.simulate(made or task(), on or data(), **words)


def bits(result):
    return {name: array.tobytes() for name, array in result.parameters.items()}


def plain(record):
    """A record without what a clock says."""
    return {
        name: getattr(record, name)
        for name in record.__struct_fields__
        if name not in ("time", "seconds")
    }


def client_updates(made, on, clients, seed, number):
    """Each client's own update and its number of rows, by the engine, client after client."""
    engine = CohortEngine(made, on, strategy="reference")
    found = {}
    for client in clients:
        steps = batches(
            on.offsets,
            np.array([client]),
            batch_size=made.batch_size,
            local_epochs=made.local_epochs,
            max_rows=made.max_rows,
            seed=seed,
            round_number=number,
        )
        result, _ = engine.train(engine.initial(), steps, PLAIN)
        found[client] = (result.update[0].numpy(), int(steps.num_examples[0]))
    return engine.initial().numpy(), found


def flat(result):
    return np.concatenate([array.reshape(-1) for array in result.parameters.values()])


def test_a_round_is_the_weighted_mean_of_its_clients():
    made, on, clients = task(), data(), np.array([2, 4, 9])
    result = run(made=made, on=on, rounds=1, cohort=3, participation=lambda number: clients)
    before, updates = client_updates(made, on, clients.tolist(), 3, 1)
    weights = np.array([count for _, count in updates.values()], np.float64)
    mean = weights @ np.stack([update for update, _ in updates.values()]) / weights.sum()
    np.testing.assert_allclose(flat(result), before + mean, rtol=0, atol=1e-6)
    (record,) = result.history
    assert (record.num_clients, record.num_examples, record.weight) == (
        3,
        weights.sum(),
        weights.sum(),
    )
    assert record.num_steps == sum(2 * -(-int(count) // 4) for count in weights)


def test_fixed_point_is_the_arithmetic_of_devices():
    made, on, clients = task(), data(), np.array([2, 4, 9])
    words = {"clip_norm": 0.3, "max_weight": 8, "cohort": 3, "rounds": 1}
    result = run(
        made=made,
        on=on,
        participation=lambda number: clients,
        aggregation="fixed-point",
        **words,
    )
    before, updates = client_updates(made, on, clients.tolist(), 3, 1)
    seed = derive_seed(3, 1, 1)
    codec = ContributionCodec(
        len(before), 0.3, 8, (), 3, bits=16, rotation_seed=derive_seed(seed, "rotation")
    )
    total = codec.empty()
    for client, (update, count) in updates.items():
        rng = stream(derive_seed(seed, str(client)), "rounding")
        codec.add(total, codec.encode(update, count, {}, rng))
    mean = codec.decode(total).mean_update
    np.testing.assert_allclose(flat(result), before + mean, rtol=0, atol=1e-6)
    assert result.history[0].clipped == codec.decode(total).clipped_share > 0
    secure = run(
        made=made, on=on, participation=lambda number: clients, aggregation="secure", **words
    )
    assert bits(secure) == bits(result)


def test_clipping_bounds_every_update():
    one = run(rounds=1, cohort=1, clip_norm=0.01)
    before = flat(run(rounds=1, cohort=1, made=task(learning_rate=0.0)))
    assert np.linalg.norm(flat(one) - before) == pytest.approx(0.01, rel=1e-4)
    assert one.history[0].clipped == 1.0
    loose = run(rounds=2, clip_norm=1e6)
    np.testing.assert_allclose(flat(loose), flat(run(rounds=2)), rtol=0, atol=1e-6)


def test_the_fastest_strategy_gives_the_same_to_rounding():
    np.testing.assert_allclose(flat(run(strategy="auto")), flat(run()), rtol=0, atol=1e-5)


def task_of_moody_machines(measured):
    """Whoever measures first finds one strategy fastest, and whoever measures again, in any process, another."""

    def moody(tuning, strategy, chunk):
        try:
            os.close(os.open(measured, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return (Choice("eager", 1),)
        return (Choice("stacked", 3),)

    Tuning.choices = moody  # type: ignore[method-assign]  # in the worker that makes the task
    return task()


@pytest.fixture
def moody_run(monkeypatch, tmp_path):
    monkeypatch.setattr(Tuning, "choices", Tuning.choices)  # to have it back
    runs = itertools.count()
    mark = tmp_path

    def bits_of_run(measured=False, **words):
        nonlocal mark
        if not measured:
            mark = tmp_path / f"measured-{next(runs)}"
        made = partial(task_of_moody_machines, mark)
        return bits(run(made=made, strategy="auto", shards=4, **words))

    return bits_of_run


def test_what_is_fastest_is_measured_once_for_all_workers(moody_run):
    alone = moody_run()
    assert moody_run(workers=2) == alone
    assert alone != moody_run(measured=True)  # another choice would have given other bits


def test_what_is_fastest_is_not_measured_again_after_a_resume(moody_run, tmp_path):
    whole = moody_run(rounds=4)
    moody_run(rounds=2, directory=tmp_path / "run")
    assert moody_run(measured=True, rounds=4, directory=tmp_path / "run", resume=True) == whole


def test_a_run_goes_on_with_the_shards_it_began_with_whoever_trains_them(tmp_path):
    whole = run(rounds=3, workers=2)
    run(rounds=1, workers=2, directory=tmp_path)
    alone = run(rounds=3, directory=tmp_path, resume=True)
    assert bits(alone) == bits(whole)
    assert bits(whole) != bits(run(rounds=3))  # so the shards matter


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path, method):
    words = {"method": method, "evaluate_on": data(4, seed=9), "evaluate_every": 2}
    whole = run(**words)
    for directory, rounds in ((tmp_path / "a", 2), (tmp_path / "b", 3)):
        run(directory=directory, **{**words, "rounds": rounds})
    # b: its last checkpoint is lost, its history goes further
    lost = Checkpoints(tmp_path / "b" / "checkpoints")
    for file in (lost.directory / "round-000003").iterdir():
        file.unlink()
    (lost.directory / "round-000003").rmdir()
    for directory in (tmp_path / "a", tmp_path / "b"):
        resumed = run(directory=directory, resume=True, **words)
        assert bits(resumed) == bits(whole)
        read = read_history(directory / "history.jsonl")
        assert [r.round for r in read] == [1, 2, 3, 4]
        assert [plain(r)["loss"] for r in read] == [plain(r)["loss"] for r in whole.history]
    assert [bool(r.evaluation) for r in whole.history] == [False, True, False, True]


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first, again, other = run(), run(), run(seed=4)
    assert bits(first) == bits(again)
    assert [plain(r) for r in first.history] == [plain(r) for r in again.history]
    assert bits(first) != bits(other)


def test_shards_change_the_order_of_additions_only():
    one, five = run(shards=1), run(shards=5)
    assert [r.num_steps for r in one.history] == [r.num_steps for r in five.history]
    np.testing.assert_allclose(flat(one), flat(five), rtol=0, atol=1e-5)


def test_learning_is_measured_and_ends_when_the_target_is_reached(tmp_path):
    result = run(
        rounds=200,
        evaluate_on=data(6, seed=1),
        target=Target(metric="top1", value=0.8),
        train_metrics=True,
        directory=tmp_path,
    )
    assert 1 < len(result.history) < 200
    assert result.metrics["evaluation.top1"] >= 0.8
    assert set(result.history[-1].metrics) == {"top1"}
    assert "target" in result.reason
    again = run(
        rounds=200,
        evaluate_on=data(6, seed=1),
        target=Target(metric="top1", value=0.8),
        train_metrics=True,
        directory=tmp_path,
        resume=True,
    )
    assert bits(again) == bits(result)
    assert again.best_round == result.best_round
    model = result.model()
    rows = data(6, seed=1).inputs
    guess = model(torch.from_numpy(rows["x"])).argmax(1).numpy()
    assert np.mean(guess == rows["y"]) == pytest.approx(result.metrics["evaluation.top1"])
    assert result.best_parameters().keys() == result.parameters.keys()


def test_early_stopping_keeps_the_best_round(tmp_path):
    result = run(
        rounds=50,
        made=task(learning_rate=1e-9),
        evaluate_on=data(3),
        early_stopping=EarlyStopping(patience=3, min_delta=1.0),
        directory=tmp_path,
    )
    assert len(result.history) == 4
    assert "not become better" in result.reason


def test_dropped_clients_do_not_count():
    result = run(rounds=20, cohort=8, dropout=0.5, made=task(learning_rate=0.01))
    counts = [record.num_clients for record in result.history]
    assert 2 < np.mean(counts) < 6
    assert min(counts) >= 1


def test_only_who_is_available_takes_part():
    slots = np.zeros((12, 2), np.bool_)
    slots[2:5, 0] = slots[7:9, 1] = True
    everybody = run(rounds=4, cohort=9, availability=Traces(slots))
    assert [record.num_clients for record in everybody.history] == [2, 3, 2, 3]
    nobody = np.zeros((12, 1), np.bool_)
    with pytest.raises(InvalidInput, match="round 1 has no client"):
        run(availability=Traces(nobody))
    with pytest.raises(InvalidConfig, match="said twice"):
        run(dropout=0.1, participation=lambda number: np.array([1]))


def test_more_clients_are_asked_than_reports_are_wanted():
    draw = Participation(num_clients=12, seed=1, cohort_size=4, over_selection=2.0, drop_out=0.4)
    for record in run(rounds=6, participation=draw).history:
        assert record.num_clients <= 4
        clients = draw.cohort(record.round).reporting
        assert record.num_clients == len(clients[clients > 0])  # the first has no rows


def test_numbers_that_are_not_finite_end_the_run_and_name_the_round(tmp_path):
    calls: list[object] = []
    with pytest.raises(NumericFailure, match=r"round \d+") as caught:
        run(made=task(learning_rate=1e38), rounds=9, callbacks=[calls.append], directory=tmp_path)
    assert "learning rate" in caught.value.hint
    assert caught.value.details["round"] == len(calls) + 1
    assert len(read_history(tmp_path / "history.jsonl")) == len(calls)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"cohort": 12}, "cohort is larger"),
        ({"cohort": 0}, "cohort must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"method": "FedAvgg"}, "unknown method"),
        ({"method_settings": {"momentum": 0.5}}, "no setting"),
        ({"aggregation": "fixed-point"}, "clip_norm"),
        ({"aggregation": "sum"}, "unknown aggregation"),
        ({"aggregation": "fixed-point", "clip_norm": 1.0, "method": "SCAFFOLD"}, "SCAFFOLD"),
        ({"aggregation": "fixed-point", "clip_norm": 1.0, "method": "FedNova"}, "FedNova"),
        ({"clip_norm": 1.0, "method": "Median"}, "Median"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"strategy": "fastest"}, "unknown strategy"),
        ({"resume": True}, "without a directory"),
        ({"target": Target(metric="top5", value=1.0), "evaluate_on": data()}, "top5"),
        ({"early_stopping": EarlyStopping(metric="top1")}, "top1"),
        ({"shards": 0}, "shards"),
        ({"aggregation": "secure", "clip_norm": 1.0, "cohort": 2}, "more clients"),
        ({"initial": {"w": np.zeros(1, np.float32)}}, "parameter"),
    ],
)
def test_settings_that_make_no_sense_are_refused(words, said):
    with pytest.raises(HomespunError, match=said):
        run(**words)


def test_a_directory_belongs_to_one_run(tmp_path):
    run(directory=tmp_path, rounds=1)
    with pytest.raises(Conflict, match="there is a simulation"):
        run(directory=tmp_path, rounds=1)
    with pytest.raises(Conflict, match="another seed"):
        run(directory=tmp_path, resume=True, seed=4)
    with pytest.raises(InvalidInput, match="no client"):
        run(participation=lambda number: np.array([0]))
    with pytest.raises(InvalidConfig, match="patience"):
        EarlyStopping(patience=0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"made": task(learning_rate=0.3)}, "another task"),
        ({"made": replace(task(), batch_size=5)}, "another task"),
        ({"made": replace(task(), max_rows=9)}, "another task"),
        ({"on": data(seed=1)}, "another data"),
        ({"method_settings": {"momentum": 0.8}}, "another method"),
        ({"participation": Participation(num_clients=12, seed=3, cohort_size=5)}, "another part"),
    ],
)
def test_a_resumed_run_is_the_same_run(tmp_path, changed, said):
    words = {"directory": tmp_path, "method": "FedAvgM"}
    run(**words, rounds=1)
    with pytest.raises(Conflict, match=said):
        run(**{**words, **changed}, resume=True)
    assert len(run(**words, resume=True).history) == 4


def test_rows_that_changed_are_another_run(tmp_path):
    run(directory=tmp_path, rounds=1)
    other = data()
    other.inputs["x"][7, 2] += 1
    with pytest.raises(Conflict, match="another data"):
        run(on=other, directory=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("name", "settings", "terms", "said"),
    [
        ("SCAFFOLD", {}, {"momentum": 0.9}, "momentum"),
        ("SCAFFOLD", {}, {"max_grad_norm": 1.0}, "max_grad_norm"),
        ("SCAFFOLD", {}, {"weight_decay": 0.1}, ""),
        ("MimeLite", {}, {"weight_decay": 0.1}, "weight_decay"),
        ("MimeLite", {}, {"momentum": 0.9}, "momentum"),
        ("FedNova", {}, {"momentum": 0.5}, "momentum"),
        ("FedNova", {"momentum": 0.5}, {}, "momentum"),
        ("FedNova", {"momentum": 0.5}, {"momentum": 0.5}, ""),
        ("FedAvg", {}, {"momentum": 0.9, "proximal": 0.1, "max_grad_norm": 1.0}, ""),
    ],
)
def test_methods_refuse_local_steps_that_they_are_not_derived_for(name, settings, terms, said):
    optimizer = ClientOptimizer(learning_rate=0.1, **terms)
    words = {
        "method": name,
        "method_settings": settings,
        "made": replace(task(), optimizer=optimizer),
    }
    if not said:
        run(**words, rounds=1)
        return
    with pytest.raises(InvalidConfig, match=f"does not hold for this {said}"):
        run(**words)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailure, match="file/run cannot be made"):
        run(directory=tmp_path / "file" / "run")


def test_the_package_imports_without_pytorch():
    program = (
        "import sys\n"
        "for absent in ('torch', 'onnx', 'onnxscript'): sys.modules[absent] = None\n"
        "import homespun, homespun.simulation, homespun.cli.main\n"
        "assert homespun.__version__ and not hasattr(homespun, 'nothing')\n"
        "from homespun.simulation import Arena\n"
        "from homespun import Arena as same\n"
        "assert Arena is same\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def counting():
    """FedAvg whose clients keep how many steps they have made so far."""
    averaging = method("FedAvg")

    def report(model, server, clients, results):
        (result,) = results
        weight = result.num_examples
        kept = {"steps": clients["steps"] + result.num_steps[:, None]}
        return Report({"update": weight[:, None] * result.update}, {"weight": weight}, kept)

    return replace(
        averaging, client_begin=lambda model, layout: {"steps": model[:1] * 0}, report=report
    )


def test_each_client_keeps_what_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(_registry, "counting", ("counting", counting, {}))
    on, everybody, some = data(), np.arange(1, 12), np.array([9, 2, 5, 7])
    run(
        on=on,
        rounds=3,
        cohort=11,
        shards=1,
        method="counting",
        participation=lambda number: some if number == 2 else everybody,
        directory=tmp_path,
    )
    kept = ClientStore.of(Checkpoints(tmp_path / "checkpoints").load(3).clients)
    steps = 2 * -(-np.minimum(on.num_rows[everybody], 10) // 4)
    assert (np.diff(steps) > 0).any()  # so that the engine's order is not the cohort's
    expected = steps * (2 + np.isin(everybody, some))
    assert kept.take(everybody)["steps"][:, 0].tolist() == expected.tolist()
