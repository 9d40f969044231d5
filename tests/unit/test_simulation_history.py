"""History and what is read off it: a file that survives cuts, and the reasons to stop."""

from __future__ import annotations

import msgspec
import pytest

from homespun.errors import InvalidConfig, InvalidInput
from homespun.simulation.history import History, RoundRecord, read_history
from homespun.simulation.report import plot, summary
from homespun.simulation.stopping import EarlyStopping, Target, best_round, reason_to_stop


def record(number, loss=1.0, evaluation=None, **metrics):
    return RoundRecord(
        round=number,
        time="2025-01-01T00:00:00+00:00",
        loss=loss,
        metrics=metrics,
        evaluation=evaluation or {},
        num_clients=3,
        num_examples=30,
        num_steps=6,
        weight=30.0,
        seconds=0.5,
    )


def test_records_are_read_as_they_were_written(tmp_path):
    history = History(tmp_path / "history.jsonl")
    for number in (1, 2):
        history.append(record(number, top1=0.1 * number))
    assert read_history(tmp_path / "history.jsonl") == history.records


def test_a_line_that_was_cut_off_is_left_out_and_another_bad_one_is_not(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path)
    for number in (1, 2):
        history.append(record(number))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert [r.round for r in read_history(path)] == [1]
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(InvalidInput, match="line 1"):
        read_history(path)


def test_a_resumed_history_ends_where_the_checkpoint_is(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path)
    for number in (1, 2, 3):
        history.append(record(number))
    resumed = History.resume(path, 2)
    resumed.append(record(3, loss=0.5))
    assert [(r.round, r.loss) for r in read_history(path)] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    with pytest.raises(InvalidInput, match="lacks rounds"):
        History.resume(path, 4)


def test_patience_counts_measurements_that_are_not_better():
    rule = EarlyStopping(patience=2, min_delta=0.1)
    losses = [1.0, 0.8, 0.75, 0.5, 0.45, 0.41]
    reasons = [
        reason_to_stop([record(i + 1, v) for i, v in enumerate(losses[:n])], rule, None, False)
        for n in range(1, 7)
    ]
    assert [bool(reason) for reason in reasons] == [False] * 5 + [True]
    assert "loss" in reasons[-1]


def test_only_evaluations_count_where_there_are_any():
    rounds = [
        record(1, 9.0),
        record(2, 0.1, {"loss": 2.0}),
        record(3, 0.0),
        record(4, 0, {"loss": 1}),
    ]
    assert best_round(rounds, "loss", "min", True) == 4
    assert best_round(rounds, "loss", "min", False) == 3
    stop = EarlyStopping(patience=1)
    assert reason_to_stop(rounds[:3], stop, None, True) == ""
    assert reason_to_stop([*rounds, record(5, 0.0, {"loss": 1.5})], stop, None, True)


def test_a_target_is_reached_from_its_side():
    up, down = Target(metric="top1", value=0.9), Target(metric="loss", value=0.2)
    assert reason_to_stop([record(1, 0.3, top1=0.8)], None, up, False) == ""
    assert reason_to_stop([record(1, 0.3, top1=0.9)], None, up, False)
    assert reason_to_stop([record(1, 0.3)], None, down, False) == ""
    assert reason_to_stop([record(1, 0.2)], None, down, False)
    lower = Target(metric="top1", value=0.5, mode="min")
    assert reason_to_stop([record(1, top1=0.4)], None, lower, False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EarlyStopping(patience=0),
        lambda: EarlyStopping(min_delta=-1.0),
        lambda: EarlyStopping(mode="lower"),  # type: ignore[arg-type]
        lambda: Target(metric="loss", value=float("nan")),
    ],
)
def test_rules_that_make_no_sense_are_refused(make):
    with pytest.raises(InvalidConfig):
        make()


def test_the_plot_holds_each_metric_and_the_report_each_of_few_rounds():
    rounds = [record(n, 1 / n, {"loss": 2 / n, "top<1": n / 9}, top1=n / 9) for n in range(1, 6)]
    drawn = plot(rounds)
    assert drawn.count("<polyline") == 4  # loss twice, top1, top<1
    assert "top&lt;1" in drawn
    told = summary(rounds, "run")
    assert "5 rounds in 2.5 s" in told
    assert told.count("\n| ") == 6
    assert "lowest evaluation loss: round 5" in told
    assert summary([record(n) for n in range(1, 101)], "run").count("\n| ") <= 22
    assert "virtual" not in told
    assert "staleness" not in told
    slow = [
        msgspec.structs.replace(
            r, virtual_seconds=90.0 * r.round, staleness=0.5, most_stale=r.round
        )
        for r in rounds
    ]
    assert "virtual time: 450 s" in summary(slow, "run")
    assert "staleness: 0.50 on average, 5 at most" in summary(slow, "run")
    with pytest.raises(InvalidInput):
        plot([])
