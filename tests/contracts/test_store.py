"""What every store must do, run against each database. The fleet tests use it through the server."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import alembic.command
import alembic.config
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, select, text
from sqlalchemy.exc import IntegrityError

from homespun.errors import Conflict, NotAuthentic, NotFound, StorageFailure
from homespun.protocol.messages import (
    Aggregation,
    Criteria,
    ReleaseManifest,
    SignedRelease,
    TaskKind,
    encode,
)
from homespun.protocol.pacing import Pace
from homespun.protocol.release import ReleaseEvent as E
from homespun.protocol.release_request import ReleaseRequest
from homespun.protocol.round import RoundState
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import MetricView
from homespun.server import store as store_module
from homespun.server.store import Store
from homespun.server.store.records import (
    Drawn,
    Gathered,
    Recorded,
    Refused,
    RoundResult,
    Trained,
    TurnedAway,
)
from homespun.server.store.reports import receipt_id
from homespun.server.store.schema import metadata, rates, rounds

PLAN, FIRST, SECOND, CHAIN, SUM, BODY = (character * 64 for character in "123456")
NOW = 1000.0


@pytest.fixture(params=["sqlite"])
def url(request, tmp_path):
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture
def store(url):
    store = Store(url)
    store.enrolment.create_population("phones", NOW)
    store.catalogue.add_plan(PLAN, "plan", 10, b"{}", NOW)
    store.catalogue.add_checkpoint(FIRST, PLAN, 20, NOW)
    yield store
    store.close()


def spec(**fields):
    return TaskSpec(
        **{
            "name": "train",
            "population": "phones",
            "kind": TaskKind.TRAIN,
            "plan_hash": PLAN,
            "checkpoints": (FIRST,),
            "goal": 3,
            "minimum": 3,
            "min_group": 3,
            "aggregation": Aggregation.PLAIN,
            "over_selection": 1.0,
            "selection_s": 10.0,
            "deadline_s": 100.0,
            "criteria": Criteria(),
            **fields,
        }
    )


def live(store, now=NOW):
    (record,) = store.rounds.live(now)
    return record


def running(store, **fields):
    """A task whose round 1 runs, and the tickets of its devices."""
    task = store.tasks.create(spec(**fields), "t1", CHAIN, NOW)
    store.rounds.open(live(store).round_id, NOW)
    for index in range(task.spec.cohort_size):
        store.claims.claim("t1", 1, 1, f"d{index}", NOW, NOW + 50)
    store.rounds.select(live(store).round_id, NOW)
    answers = [store.claims.answer("t1", 1, 1, f"d{i}") for i in range(task.spec.cohort_size)]
    assert all(isinstance(answer, Drawn) for answer in answers)
    return live(store).round_id, [answer.assignment_id for answer in answers]


def commit(store, round_id, tickets):
    store.reports.record(round_id, None, SUM, {receipt_id(t): BODY for t in tickets})
    store.rounds.close(round_id, NOW)
    result = RoundResult(
        weight=1.0, clipped_share=0.0, metrics={"loss": MetricView(sum=1, count=2)}
    )
    store.rounds.aggregate(round_id, Trained(SECOND, CHAIN, SUM, result))
    store.rounds.commit(round_id, NOW, 30)


# --- the database ----------------------------------------------------------------------------------


def test_migrations_make_exactly_the_schema(store):
    with store.database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_opening_again_keeps_everything(store, url):
    store.tasks.create(spec(), "t1", CHAIN, NOW)
    store.close()
    again = Store(url)
    assert again.tasks.get("t1").spec == spec()
    again.close()


def test_the_schema_is_documentation():
    for table in metadata.tables.values():
        assert table.comment, table.name
        readers = ("Operators", "operators", "Server", "evices", "Who knows")
        assert any(reader in table.comment for reader in readers), table.name
        for column in table.columns:
            assert column.comment, f"{table.name}.{column.name}"


def test_a_failing_block_writes_nothing(store):
    def fail():
        with store.database.write() as connection:
            connection.execute(text("DELETE FROM checkpoints"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert store.catalogue.has_checkpoint(FIRST)


def test_a_failing_database_is_a_storage_failure_without_values(store):
    with pytest.raises(StorageFailure) as caught, store.database.read() as connection:
        connection.execute(text("SELECT * FROM absent WHERE secret = 's3cret'"))
    assert "s3cret" not in str(caught.value)


def test_writers_take_turns(store):
    view = store.enrolment.create_token("phones", "id", "token", None, None)
    assert view.token == "token"

    def join(index):
        store.enrolment.enroll("phones", "token", f"d{index}", bytes(32), NOW)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(join, range(40)))
    (population,) = store.enrolment.populations()
    assert population.num_devices == 40


def test_a_reader_sees_one_moment(store):
    with store.database.read() as connection:
        count = text("SELECT count(*) FROM plans")
        before = connection.execute(count).scalar()
        writer = threading.Thread(
            target=store.catalogue.add_plan, args=("7" * 64, "other", 1, b"", NOW)
        )
        writer.start()
        writer.join()
        assert connection.execute(count).scalar() == before


# --- enrolment -------------------------------------------------------------------------------------


def test_a_token_is_counted_once_per_device_even_in_a_race(store):
    store.enrolment.create_token("phones", "id", "token", 1, None)

    def join(_):
        store.enrolment.enroll("phones", "token", "d", bytes(32), NOW)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(join, range(8)))
    with pytest.raises(NotAuthentic):
        store.enrolment.enroll("phones", "token", "e", bytes(32), NOW)
    device = store.enrolment.device("d")
    assert (device.public_key, device.populations) == (bytes(32), frozenset({"phones"}))
    assert store.enrolment.device("e") is None


# --- rounds ----------------------------------------------------------------------------------------


def test_a_task_begins_with_a_planned_round_and_grants(store):
    store.tasks.create(spec(), "t1", CHAIN, NOW)
    record = live(store)
    assert (record.view.state, record.number, record.attempt) == (RoundState.PLANNED, 1, 1)
    assert record.base == FIRST
    assert store.catalogue.may_download({"phones"}, PLAN)
    assert store.catalogue.may_download({"phones"}, FIRST)
    assert not store.catalogue.may_download({"others"}, FIRST)
    assert not store.catalogue.may_download(set(), FIRST)
    with pytest.raises(NotFound):
        store.tasks.create(spec(name="x", plan_hash="9" * 64), "t2", CHAIN, NOW)


def test_claims_gather_and_lapse(store):
    store.tasks.create(spec(pool_target=3), "t1", CHAIN, NOW)
    assert store.claims.claim("t1", 1, 1, "d0", NOW, NOW + 50) == TurnedAway("unknown_round")
    store.rounds.open(live(store).round_id, NOW)
    for is_new in (True, False):
        answer = store.claims.claim("t1", 1, 1, "d0", NOW, NOW + 5)
        assert answer == Gathered(due=False, is_new=is_new)
    assert live(store).view.num_waiting == 1
    store.claims.claim("t1", 1, 1, "d1", NOW, NOW + 50)
    assert store.claims.claim("t1", 1, 1, "d2", NOW, NOW + 50) == Gathered(due=True, is_new=True)
    assert live(store, NOW + 5).view.num_waiting == 2
    with pytest.raises(Conflict):
        store.rounds.select(live(store).round_id, NOW + 5)
    assert live(store).view.state is RoundState.OPEN
    store.rounds.select(live(store).round_id, NOW)
    assert store.claims.answer("t1", 1, 1, "d9") == TurnedAway("round_closed")


def test_a_window_that_nobody_used_begins_again_with_the_first(store):
    store.tasks.create(spec(), "t1", CHAIN, NOW)
    store.rounds.open(live(store).round_id, NOW)
    later = NOW + 100
    for index in range(3):
        answer = store.claims.claim("t1", 1, 1, f"d{index}", later, later + 50)
        assert answer == Gathered(due=False, is_new=True)
    assert live(store, later).view.select_at == later + 10
    answer = store.claims.claim("t1", 1, 1, "d0", later + 10, later + 50)
    assert answer == Gathered(due=True, is_new=False)


def counted(store, hour):
    with store.database.read() as connection:
        query = select(rates.c.num_reported, rates.c.num_lost).where(rates.c.hour == hour)
        return connection.execute(query).first()


HOUR = int(NOW % 86_400 // 3600)


def test_who_still_worked_at_the_fence_and_heard_of_it_is_not_counted(store):
    round_id, tickets = running(store, goal=3, over_selection=7 / 3)
    store.reports.void(tickets[6], "given up")
    commit(store, round_id, tickets[:3])  # 3 to 5 are late
    for ticket, device in ((tickets[3], "d3"), (tickets[4], "d4")):
        assert not store.reports.expectation(ticket, device).has_heard
        store.reports.tell(ticket)
        assert store.reports.expectation(ticket, device).has_heard
    store.rates.tally(NOW + 99)
    assert counted(store, HOUR) is None  # the deadline has not passed
    for _ in range(2):
        store.rates.tally(NOW + 100)
        assert counted(store, HOUR) == (3, 2)  # number 6 gave up, 5 was never heard of


def test_who_is_missing_at_the_deadline_is_lost(store):
    round_id, tickets = running(store, goal=3, over_selection=2.0)
    store.reports.record(round_id, None, SUM, {receipt_id(tickets[0]): BODY})
    store.rounds.abandon(round_id, NOW + 100, "too few")
    assert counted(store, HOUR) == (1, 5)


def test_the_cohort_follows_what_became_of_the_last(store):
    task = store.tasks.create(spec(over_selection=None, goal=100, num_rounds=9), "t1", CHAIN, NOW)
    store.rounds.open(live(store).round_id, NOW)
    assert live(store).num_wanted == task.spec.cohort_size == 200
    for index in range(300):
        store.claims.claim("t1", 1, 1, f"d{index}", NOW, NOW + 50)
    store.rounds.select(live(store).round_id, NOW)
    answers = [store.claims.answer("t1", 1, 1, f"d{i}") for i in range(300)]
    tickets = [answer.assignment_id for answer in answers if isinstance(answer, Drawn)]
    assert len(tickets) == 200
    first = live(store).round_id
    commit(store, first, tickets[:180])
    store.rounds.scrub(first)
    store.rates.tally(NOW + 100)
    store.rounds.open(live(store).round_id, NOW + 200)
    assert 110 < live(store).num_wanted < 135  # 20 of 200 were lost


def test_paces_are_kept(store, url):
    store.pacing.save({"phones": Pace().saved()})
    pace = Pace()
    pace.promise(NOW, 10.0, 100)
    store.pacing.save({"phones": pace.saved(), "nobody's": pace.saved()})
    store.close()
    again = Store(url)
    ((name, kept),) = again.pacing.all().items()
    assert (name, kept.saved()) == ("phones", pace.saved())
    again.close()


def test_transitions_follow_the_table_and_change_nothing_otherwise(store):
    round_id, _ = running(store)
    for call in (
        lambda: store.rounds.open(round_id, NOW),
        lambda: store.rounds.select(round_id, NOW),
        lambda: store.rounds.commit(round_id, NOW, 0),
        lambda: store.rounds.scrub(round_id),
    ):
        with pytest.raises(Conflict):
            call()
    assert live(store).view.state is RoundState.RUNNING


def test_a_group_of_reports_is_all_or_nothing(store):
    round_id, tickets = running(store)
    ids = [receipt_id(ticket) for ticket in tickets]
    assert store.reports.record(round_id, None, SUM, {ids[0]: BODY}) == Recorded(due=False)
    assert store.reports.snapshot(round_id) == SUM
    # ids[0] is in already, and "x" is nobody's: the group is refused as a whole, naming them.
    refused = store.reports.record(round_id, SUM, "7" * 64, {ids[0]: BODY, ids[1]: BODY, "x": BODY})
    assert refused == Refused(frozenset({ids[0], "x"}))
    assert store.reports.expectation(tickets[1], "d1").receipt.state == "expected"
    # The sum that somebody else moved meanwhile.
    assert store.reports.record(round_id, None, "7" * 64, {ids[1]: BODY}) == Refused(frozenset())
    assert store.reports.snapshot(round_id) == SUM
    rest = {ids[1]: BODY, ids[2]: BODY}
    assert store.reports.record(round_id, SUM, "7" * 64, rest) == Recorded(due=True)
    assert live(store).view.num_reported == 3
    assert live(store).view.num_open == 0


def test_the_fence(store):
    round_id, tickets = running(store)
    store.reports.record(round_id, None, SUM, {receipt_id(tickets[0]): BODY})
    store.rounds.close(round_id, NOW)
    late = {receipt_id(tickets[1]): BODY}
    assert store.reports.record(round_id, SUM, "7" * 64, late) == Refused(frozenset(late))
    assert store.reports.expectation(tickets[1], "d1").receipt.state == "late"
    with store.database.write() as connection:  # the fence does not rely on the receipt alone
        connection.execute(text("UPDATE receipts SET state = 'expected' WHERE state = 'late'"))
    assert store.reports.record(round_id, SUM, "7" * 64, late) == Refused(frozenset(late))
    with store.database.write() as connection:
        connection.execute(text("UPDATE receipts SET state = 'late' WHERE state = 'expected'"))
    store.reports.void(tickets[1], "too late to give up")
    assert store.reports.expectation(tickets[1], "d1").receipt.state == "late"


def test_committing(store):
    round_id, tickets = running(store, num_rounds=2)
    commit(store, round_id, tickets)
    task = store.tasks.get("t1")
    assert (task.head, task.rounds_committed, task.optimizer_state) == (SECOND, 1, SUM)
    receipt = store.reports.expectation(tickets[0], "d0").receipt
    assert (receipt.state, receipt.checkpoint, receipt.digest) == ("included", SECOND, BODY)
    store.rounds.scrub(round_id)
    assert live(store).number == 2
    assert live(store).base == SECOND
    # After the round anyone who knows the ticket may ask; nothing says whose it was.
    assert store.reports.expectation(tickets[0], "d1").receipt == receipt
    pushed, trained = store.catalogue.models()
    assert (pushed.hash, pushed.parent) == (FIRST, None)
    assert (trained.hash, trained.parent, trained.round_number) == (SECOND, FIRST, 1)
    assert store.catalogue.may_download({"phones"}, SECOND)


def test_a_head_that_moved_stops_a_commit(store):
    round_id, tickets = running(store)
    with store.database.write() as connection:
        connection.execute(text("UPDATE tasks SET head = :h"), {"h": "8" * 64})
    with pytest.raises(Conflict, match="head"):
        commit(store, round_id, tickets)
    assert store.tasks.get("t1").rounds_committed == 0
    assert live(store).view.state is RoundState.AGGREGATED


def test_at_most_one_committed_attempt_per_round(store):
    round_id, tickets = running(store)
    commit(store, round_id, tickets)
    values = {"task_id": "t1", "number": 1, "attempt": 2, "state": "committed", "base": FIRST}
    zeros = {"num_assigned": 0, "num_carried": 0, "num_reported": 0, "num_late": 0, "reason": ""}
    with pytest.raises(IntegrityError), store.database.write() as connection:
        connection.execute(rounds.insert().values(**values, **zeros))


def test_abandoning_and_halting(store):
    round_id, tickets = running(store)
    store.reports.record(round_id, None, SUM, {receipt_id(tickets[0]): BODY})
    store.rounds.abandon(round_id, NOW, "too few")
    for ticket in tickets:
        receipt = store.reports.expectation(ticket, "anyone").receipt
        assert (receipt.state, receipt.reason, receipt.checkpoint) == ("void", "too few", None)
    assert (live(store).number, live(store).attempt) == (1, 2)
    summary = store.rounds.summaries(NOW, "t1")[0]
    assert (summary.state, summary.reason) == ("abandoned", "too few")
    for attempt in range(2, 6):
        record = live(store)
        assert record.attempt == attempt
        store.rounds.open(record.round_id, NOW)
        for index in range(3):
            store.claims.claim("t1", 1, attempt, f"d{index}", NOW, NOW + 50)
        store.rounds.select(record.round_id, NOW)
        store.rounds.abandon(record.round_id, NOW, "too few")
    assert store.tasks.get("t1").state == "halted"
    assert store.rounds.live(NOW) == []


def test_stopping_cancels(store):
    _, tickets = running(store)
    assert store.tasks.stop("t1", NOW).state == "stopped"
    assert store.tasks.stop("t1", NOW).state == "stopped"
    assert store.rounds.live(NOW) == []
    assert store.reports.expectation(tickets[0], "d0").receipt.state == "void"


def test_rows_that_name_devices_go_with_the_round(store):
    def named():
        with store.database.read() as connection:
            return [
                table
                for table in inspect(connection).get_table_names()
                if table != "devices"
                and "device_id" in {c["name"] for c in inspect(connection).get_columns(table)}
                and connection.execute(text(f"SELECT count(*) FROM {table}")).scalar()
            ]

    round_id, tickets = running(store)
    assert named() == ["assignments", "claims"]
    commit(store, round_id, tickets)
    store.rounds.scrub(round_id)
    assert named() == []


# --- releases --------------------------------------------------------------------------------------


def sign(manifest: ReleaseManifest) -> SignedRelease:
    return SignedRelease(manifest=str(manifest.sequence), signature="")


def move(store, record, *events):
    for event in events:
        record = store.releases.move(record, event, NOW, sign)
    return record


def ship(store, slot, version):
    request = ReleaseRequest(
        population="phones", slot=slot, plan_hash=PLAN, checkpoint=FIRST, version=version
    )
    record = store.releases.add(request, f"{slot}{version}", NOW)
    return move(store, record, E.CHECK, E.EVALUATE, E.PASS, E.DEPLOY)


def test_releases_have_growing_numbers_per_slot(store):
    assert ship(store, "a", "1").sequence == 1
    assert ship(store, "a", "2").sequence == 2
    assert ship(store, "b", "1").sequence == 1
    states = [record.state for record in store.releases.all()]
    assert states == ["superseded", "deployed", "deployed"]
    assert store.releases.deployed("phones", "a").request.version == "2"
    assert [(p, n.slot, n.sequence) for p, n in store.releases.notices()] == [
        ("phones", "a", 2),
        ("phones", "b", 1),
    ]
    with pytest.raises(Conflict):
        move(store, store.releases.get("a1"), E.CHECK)


def test_a_release_moves_once_whoever_looked_at_it(store):
    ship(store, "a", "1")
    request = ReleaseRequest(
        population="phones", slot="a", plan_hash=PLAN, checkpoint=FIRST, version="2"
    )
    seen = move(
        store, store.releases.add(request, "a2", NOW), E.CHECK, E.EVALUATE, E.PASS, E.START_CANARY
    )
    ramp = move(store, seen, E.START_RAMP)
    with pytest.raises(Conflict, match="moved on"):
        move(store, seen, E.START_RAMP)
    move(store, ramp, E.START_RAMP)
    with pytest.raises(Conflict, match="moved on"):  # the same state, but another stage
        move(store, ramp, E.START_RAMP)
    assert store.releases.get("a2").stage == 2


def test_a_held_release_goes_on_only_where_it_was(store):
    ship(store, "a", "1")
    request = ReleaseRequest(
        population="phones", slot="a", plan_hash=PLAN, checkpoint=FIRST, version="2"
    )
    held = move(store, store.releases.add(request, "a2", NOW), E.CHECK, E.EVALUATE, E.HOLD)
    assert (held.state, held.held_from) == ("held", "evaluating")
    for event in (E.PASS, E.START_CANARY, E.DEPLOY):
        with pytest.raises(Conflict, match="was held evaluating"):
            move(store, held, event)
    assert move(store, held, E.EVALUATE).state == "evaluating"


def test_a_rollback_is_a_higher_number_that_points_to_the_older_release(store):
    ship(store, "a", "1")
    second = ship(store, "a", "2")
    move(store, second, E.ROLL_BACK, E.ROLLED_BACK)
    first = store.releases.get("a1")
    assert (first.state, first.sequence, first.fraction) == ("deployed", 3, 1.0)
    assert store.releases.get("a2").state == "rolled_back"


def at_0002(url, rows):
    """A database as an older version left it. `rows`: by table, column -> value of each."""
    config = alembic.config.Config()
    config.set_main_option(
        "script_location", str(Path(store_module.__file__).parent / "migrations")
    )
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "0002")
        for table, each in rows:
            names = ", ".join(each)
            values = ", ".join(f":{name}" for name in each)
            connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), each)
    engine.dispose()


OLD = (
    ("populations", {"name": "phones", "created_at": 1}),
    (
        "plans",
        {"hash": PLAN, "name": "plan", "size_bytes": 1, "manifest": b"{}", "created_at": 1},
    ),
)


def old_release(number, state):
    return (
        "releases",
        {
            "release_id": f"r{number}",
            "population": "phones",
            "slot": "a",
            "version": f"v{number}",
            "state": state,
            "sequence": number,
            "plan_hash": PLAN,
            "checkpoint": FIRST,
            "margin": 0,
            "reason": "",
            "signed": b"{}",
            "created_at": 1,
        },
    )


def test_what_was_published_before_there_were_stages_stays_published(tmp_path):
    url = f"sqlite:///{tmp_path / 'old.db'}"
    at_0002(url, (*OLD, old_release(1, "superseded"), old_release(2, "deployed")))
    store = Store(url)
    second = store.releases.deployed("phones", "a")
    assert second is not None
    assert (second.release_id, second.sequence, second.incumbent_id) == ("r2", 2, "r1")
    assert (second.request.checkpoint, second.request.stages) == (FIRST, ())
    assert store.releases.signed("phones", "a", for_all=True) == b"{}"
    release, steps = store.releases.history("r1")
    assert [step.state for step in steps] == ["superseded"] == [release.state]
    store.close()


def test_rounds_of_an_older_version_go_on(tmp_path):
    """Every table that later versions rewrite holds rows that others refer to."""
    url = f"sqlite:///{tmp_path / 'old.db'}"
    zeros = dict.fromkeys(("num_shared", "num_masked", "num_agreed", "num_unmasked"), 0)
    counts = dict.fromkeys(("num_assigned", "num_reported", "num_late"), 3) | {"reason": ""}
    at_0002(
        url,
        (
            *OLD,
            (
                "tasks",
                {
                    "task_id": "t1",
                    "name": "train",
                    "population": "phones",
                    "plan_hash": PLAN,
                    "spec": encode(spec()).decode(),
                    "state": "active",
                    "reason": "",
                    "created_at": 1,
                    "head": FIRST,
                    "chain": CHAIN,
                    "rounds_committed": 1,
                    "failures": 0,
                },
            ),
            *(
                (
                    "rounds",
                    {
                        "round_id": number,
                        "task_id": "t1",
                        "number": number,
                        "attempt": 1,
                        "state": state,
                        "base": FIRST,
                        "deadline_at": NOW + number,
                        **counts,
                    },
                )
                for number, state in ((1, "scrubbed"), (2, "running"))
            ),
            (
                "groups",
                {
                    "group_id": 1,
                    "round_id": 2,
                    "number": 1,
                    "state": "advertise_keys",
                    "deadline_at": NOW,
                    "num_devices": 1,
                    **zeros,
                    "reason": "",
                },
            ),
            *(
                (
                    "assignments",
                    {
                        "assignment_id": ticket,
                        "round_id": 2,
                        "device_id": f"device-{ticket}",
                        "group_id": group,
                    },
                )
                for ticket, group in (("free", None), ("bound", 1))
            ),
            *(
                (
                    "receipts",
                    {"receipt_id": receipt_id(t), "round_id": n, "state": state, "reason": ""},
                )
                for t, n, state in (
                    ("past", 1, "included"),
                    ("free", 2, "expected"),
                    ("bound", 2, "expected"),
                )
            ),
            ("claims", {"round_id": 2, "device_id": "device-free", "expires_at": NOW}),
            old_release(1, "deployed"),
        ),
    )
    store = Store(url)
    with store.database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
        indexes = connection.scalars(text("SELECT sql FROM sqlite_master WHERE type = 'index'"))
        made = sorted(filter(None, indexes))
    fresh = Store(f"sqlite:///{tmp_path / 'new.db'}")
    with fresh.database.read() as connection:
        indexes = connection.scalars(text("SELECT sql FROM sqlite_master WHERE type = 'index'"))
        assert made == sorted(filter(None, indexes))
    fresh.close()
    first, second = store.rounds.summaries(NOW, "t1")
    assert (first.num_assigned, first.num_carried, second.state) == (3, 0, "running")
    expected = store.reports.expectation("bound", "device-bound")
    assert (expected.group_id, expected.is_carried, expected.expires_at) == (1, False, NOW + 2)
    assert expected.origin == 2
    assert store.reports.expectation("free", "device-free").group_id is None
    store.rates.tally(NOW + 10)  # of rounds before anybody noted who heard of their end: nothing
    with store.database.read() as connection:
        assert connection.execute(select(rates)).all() == []
    store.close()
