"""The journal keeps what a crash must not take, and forgets what nobody needs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from homespun.device.journal import DAY_S, Journal
from homespun.errors import Conflict, StorageFailure
from homespun.protocol.messages import (
    Aggregation,
    Assigned,
    Criteria,
    Encoding,
    Offer,
    TaskKind,
)
from homespun.protocol.session import Session, SessionState

NOW = 1_700_000_000.0
S = SessionState


@pytest.fixture
def journal(tmp_path: Path):
    journal = Journal(tmp_path / "journal.db")
    yield journal
    journal.close()


def offer(number: int, attempt: int = 1) -> Offer:
    return Offer(
        task_id="t1",
        task_name="train",
        kind=TaskKind.TRAIN,
        round_number=number,
        attempt=attempt,
        plan_hash="a" * 64,
        criteria=Criteria(),
        aggregation=Aggregation.PLAIN,
        min_group=3,
        download_bytes=1,
        upload_bytes=1,
    )


def record(number: int, state: SessionState, name: str = "", **changes: object) -> Session:
    session = Session(
        session_id=name or f"s{number}",
        population="p",
        state=state,
        started_at=NOW,
        offer=offer(number),
        assigned=Assigned(
            assignment_id=f"secret-assignment-{number}",
            kind=TaskKind.TRAIN,
            round_number=number,
            attempt=1,
            plan_hash="a" * 64,
            checkpoints=("b" * 64,),
            encoding=Encoding(clip_norm=1.0, max_weight=1, max_group=3),
            aggregation=Aggregation.PLAIN,
            seed=0,
            deadline_s=60.0,
        ),
    )
    return msgspec.structs.replace(session, **changes)


def test_a_session_outlives_the_process(tmp_path: Path):
    journal = Journal(tmp_path / "journal.db")
    session = record(1, S.INTENT, digest="d" * 64)
    journal.save(session, NOW)
    journal.set_retry(NOW + 5)
    journal._db.close()  # no orderly end
    again = Journal(tmp_path / "journal.db")
    assert again.session() == session
    assert again.retry_at == NOW + 5
    again.close()


def test_every_write_is_synced(journal: Journal):
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


@pytest.mark.parametrize(
    ("state", "digest", "outcome", "counts"),
    [
        (S.TRAINING, None, None, False),
        (S.INTENT, "d" * 64, None, True),
        (S.ACKNOWLEDGED, "d" * 64, "acknowledged", True),
        (S.LATE, "d" * 64, "late", True),
        (S.VOID, "d" * 64, "void", False),
        (S.VOID, None, None, False),
    ],
)
def test_intent_counts_until_it_is_void(
    state: SessionState, digest: str | None, outcome: str | None, counts: bool, journal: Journal
):
    journal.save(record(3, state, digest=digest, outcome=outcome), NOW)
    assert journal.last_round("train") == (3 if counts else None)
    assert journal.daily_participations(NOW + 1) == int(counts)
    assert journal.daily_participations(NOW + DAY_S + 1) == 0
    assert journal.was_assigned(offer(3))
    assert not journal.was_assigned(offer(3, attempt=2))


def test_after_the_end_only_hashes_and_the_round_stay(journal: Journal, tmp_path: Path):
    ended = record(3, S.CLEANED, digest="d" * 64, outcome="acknowledged")
    journal.save(ended, NOW)
    journal.finish(ended)
    assert journal.session() is None
    assert journal.unresolved() == [("s3", "secret-assignment-3")]
    journal.resolve("s3", "included", "c" * 64)
    assert journal.unresolved() == []
    (line,) = journal.recent()
    assert (line.round_number, line.outcome, line.checkpoint) == (3, "included", "c" * 64)
    journal.close()
    assert b"secret-assignment" not in (tmp_path / "journal.db").read_bytes()


def test_a_session_that_sent_nothing_has_no_receipt_to_wait_for(journal: Journal):
    ended = record(3, S.CLEANED, outcome="void")
    journal.save(ended, NOW)
    journal.finish(ended)
    assert journal.unresolved() == []


def test_refusing_a_plan_may_end(journal: Journal):
    journal.refuse_plan("a" * 64, "not signed", None)
    journal.refuse_plan("b" * 64, "no such field", NOW + 10)
    assert journal.plan_refusal("a" * 64, NOW + 1e9) == "not signed"
    assert journal.plan_refusal("b" * 64, NOW) == "no such field"
    assert journal.plan_refusal("b" * 64, NOW + 11) is None
    assert journal.plan_refusal("c" * 64, NOW) is None


def test_traffic_adds_up(journal: Journal):
    journal.add_traffic(NOW, 10, 100)
    journal.add_traffic(NOW + 1, 1, 2)
    journal.add_traffic(NOW + 2 * DAY_S, 5, 6)
    assert journal.traffic() == (16, 108)
    assert journal.traffic(NOW + DAY_S) == (5, 6)


def test_two_processes_are_not_one_device(journal: Journal, tmp_path: Path):
    with pytest.raises(Conflict, match="another process") as caught:
        Journal(tmp_path / "journal.db")
    assert caught.value.hint
    journal.set_retry(NOW)  # the first one works on


def test_a_damaged_journal_is_a_clear_failure(tmp_path: Path):
    (tmp_path / "journal.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(StorageFailure, match=r"journal\.db") as caught:
        Journal(tmp_path / "journal.db")
    assert "remove it" in caught.value.hint
