"""Any list of operations keeps the invariants of the lifecycle, checked after every single one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from homespun.errors import Expired, HomespunError
from homespun.learning.algorithm import Algorithm
from homespun.learning.contribution import Contribution
from homespun.learning.optimizers import State, server_optimizer
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.messages import Assigned, Receipt
from homespun.protocol.tasks import OptimizerSpec
from homespun.protocol.views import Event, RoundSummary, TaskView
from homespun.server.aggregation import chain
from homespun.server.store.schema import assignments, claims, metadata, rounds
from homespun.tensors import codec as tensors
from tests.fleet.world import World, scratch

NUM_DEVICES = 6
MINIMUM = 3
OPTIMIZER = OptimizerSpec(name="FedAdam", settings={"learning_rate": 0.1})

devices = st.integers(0, NUM_DEVICES - 1)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), devices),
        st.tuples(st.just("claim_all"), st.just(0)),
        st.tuples(st.just("report"), devices),
        st.tuples(st.just("report_all"), st.just(0)),
        st.tuples(st.just("spoil"), devices),
        st.tuples(st.just("abort"), devices),
        st.tuples(st.just("wait"), st.sampled_from([5, 20, 60])),
        st.tuples(st.just("restart"), st.just(0)),
        st.tuples(st.just("stop"), st.just(0)),
    ),
    min_size=5,
    max_size=30,
)


@dataclass
class Play:
    """The world, and what its devices remember: their tickets, and which reports were acknowledged."""

    world: World
    task: TaskView
    tickets: dict[int, Assigned] = field(default_factory=dict)
    acknowledged: dict[tuple[int, int], dict[int, tuple[Assigned, Contribution]]] = field(
        default_factory=dict
    )

    def do(self, name: str, argument: int) -> None:
        world = self.world
        match name:
            case "claim_all":
                for index in range(NUM_DEVICES):
                    self.do("claim", index)
            case "report_all":
                for index in list(self.tickets):
                    self.do("report", index)
            case "claim":
                last = world.rounds(self.task)[-1]
                reply = world.devices[argument].claim(self.task, last.round_number, last.attempt)
                if isinstance(reply, Assigned):
                    self.tickets[argument] = reply
            case "report" if argument in self.tickets:
                self.report(argument)
            case "spoil" if argument in self.tickets:
                ticket = self.tickets[argument]
                before = world.devices[argument].receipt(ticket)
                body = bytearray(world.devices[argument].body(ticket))
                body[12] ^= 0xFF
                try:
                    after = world.devices[argument].report(ticket, bytes(body))
                    raise AssertionError(f"taken: {before} -> {after}")
                except HomespunError:
                    pass
            case "abort" if argument in self.tickets:
                world.devices[argument].abort(self.tickets[argument])
            case "wait":
                world.clock.advance(argument)
            case "restart":
                world.restart()
            case "stop":
                if self.task.spec.seed == 1:  # in one world of the two, so that most go on
                    world.operate(dict, "POST", f"/tasks/{self.task.task_id}/stop")
        world.settle()

    def report(self, index: int) -> None:
        device, ticket = self.world.devices[index], self.tickets[index]
        try:
            receipt: Receipt = device.report(ticket)
        except Expired:
            return
        assert receipt.state in ("acknowledged", "included", "void")
        attempt = (ticket.round_number, ticket.attempt)
        reports = self.acknowledged.setdefault(attempt, {})
        reports[index] = (ticket, device.contribution(ticket))

    # --- what must hold ---------------------------------------------------------------------------

    def check(self) -> None:
        summaries = self.world.rounds(self.task)
        task = self.world.task(self.task)
        included = {}
        for summary in summaries:
            attempt = (summary.round_number, summary.attempt)
            reports = self.acknowledged.get(attempt, {})
            for index, (ticket, _) in reports.items():
                receipt = self.world.devices[index].receipt(ticket)
                match summary.state:  # 3: acknowledged ends as included or void
                    case "running":
                        assert receipt.state == "acknowledged"
                    case "scrubbed":
                        assert receipt.state == "included"
                        assert receipt.checkpoint == summary.checkpoint
                    case "abandoned" | "cancelled":
                        assert (receipt.state, receipt.reason) == ("void", summary.reason)
                    case state:
                        raise AssertionError(f"settled, but {state}")
            assert summary.num_reported == len(reports)
            if summary.state == "scrubbed":
                assert summary.round_number not in included  # 1
                included[summary.round_number] = summary
                assert summary.num_reported >= MINIMUM  # 4
            else:
                assert (summary.checkpoint, summary.weight, summary.metrics) == (None, None, {})
        assert len(included) == task.rounds_committed
        self.check_numbers(included)
        self.check_rows()

    def check_numbers(self, included: dict[int, RoundSummary]) -> None:
        """1, 2, 5: the chain is exactly what the acknowledged reports make, each counted once."""
        manifest = self.world.plan.manifest
        rule = server_optimizer(OPTIMIZER.name, OPTIMIZER.settings)
        parameters = initial_checkpoint(manifest, 0)
        state: State = rule.init(parameters)
        link = chain(None, self.task.spec.checkpoints[0], 0)
        for number, summary in sorted(included.items()):
            reports = self.acknowledged[number, summary.attempt]
            codec = self.world.devices[0].codec(next(iter(reports.values()))[0])
            total = codec.empty()
            for _, contribution in reports.values():
                codec.add(total, contribution)
            algorithm = Algorithm(manifest.shapes, codec, rule)
            assert summary.base_checkpoint == tensors.digest(tensors.encode_tree(parameters))
            parameters, state, _ = algorithm.server_update(parameters, state, total)
            assert summary.checkpoint == tensors.digest(tensors.encode_tree(parameters))
            link = chain(link, summary.checkpoint, number)
        assert self.world.deployment.store.tasks.get(self.task.task_id).chain == link

    def check_rows(self) -> None:
        """7: only rounds that are not over name devices."""
        ids = {device.device_id for device in self.world.devices}
        live = ("planned", "open", "running")
        with self.world.deployment.store.database.read() as connection:
            ended = select(rounds.c.round_id).where(rounds.c.state.not_in(live))
            for table in (claims, assignments):
                rows = connection.execute(select(table).where(table.c.round_id.in_(ended)))
                assert rows.all() == []
            for table in metadata.tables.values():
                if table not in (claims, assignments) and table.name != "devices":
                    for row in connection.execute(select(table)):
                        assert not ids & set(map(str, row))


@contextmanager
def new_play(seed: int) -> Iterator[Play]:
    with scratch() as directory:
        world = World(Path(directory), NUM_DEVICES)
        task = world.create_task(
            num_rounds=3,
            goal=3,
            minimum=MINIMUM,
            min_group=MINIMUM,
            over_selection=1.4,
            pool_target=5,
            selection_s=30.0,
            deadline_s=50.0,
            optimizer=OPTIMIZER,
            seed=seed,
        )
        try:
            yield Play(world, task)
        finally:
            world.stop()


SLOW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@SLOW
@given(operations, st.integers(0, 1))
def test_invariants_hold_after_every_operation(todo, seed):
    with new_play(seed) as play:
        for name, argument in todo:
            play.do(name, argument)
            play.check()


def test_the_invariants_hold_over_a_long_rough_life():
    """One long list that reaches every state, so that the check above is known to see committed rounds."""
    todo = [
        ("claim_all", 0), ("claim_all", 0), ("report", 0), ("restart", 0), ("spoil", 1), ("abort", 2),
        ("report_all", 0), ("wait", 60), ("claim", 1), ("claim", 2), ("wait", 20), ("claim_all", 0),
        ("claim_all", 0), ("report_all", 0), ("restart", 0), ("claim_all", 0), ("claim_all", 0),
        ("report", 3), ("wait", 60), ("claim_all", 0), ("claim_all", 0), ("report_all", 0), ("wait", 5),
        ("report_all", 0),
    ]  # fmt: skip
    with new_play(0) as play:
        for name, argument in todo:
            play.do(name, argument)
            play.check()
        assert play.world.task(play.task).state == "finished"
        states = [summary.state for summary in play.world.rounds(play.task)]
        assert "abandoned" in states


@settings(SLOW, max_examples=4)
@given(operations)
def test_the_same_operations_leave_the_same_trace(todo):
    traces = []
    for _ in range(2):
        with new_play(0) as play:
            for name, argument in todo:
                play.do(name, argument)
            events = play.world.operate(list[Event], "GET", "/events")
            trace = [(e.at, e.kind, e.round_number, e.attempt, e.text) for e in events]
            traces.append((trace, play.world.task(play.task).head))
    assert traces[0] == traces[1]
