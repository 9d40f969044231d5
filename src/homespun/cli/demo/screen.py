"""What the demo prints: a line per step, a live line while it waits, a table at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.status import Status

from homespun.cli.demo.devices import NEVER_CHARGING, DemoDevice
from homespun.cli.demo.ingredients import People
from homespun.cli.output import out, percent, print_table, size
from homespun.cli.releases import describe_devices, describe_finding
from homespun.cli.tasks import dropped_out, metric, share
from homespun.clock import Clock
from homespun.device.proof import verify
from homespun.protocol.group import GroupState
from homespun.protocol.release import ReleaseState
from homespun.protocol.views import ReleaseStep, ReleaseView, RoundSummary
from homespun.types import Hash

QUIET = (ReleaseState.TRAINED, ReleaseState.CHECKED, ReleaseState.EVALUATING)
"""Steps that the next one says, too."""
ROWS = (("released model", 0), ("initial model", 1), ("commonest words", 2))


class Screen:
    """Prints to standard output; the live line appears only where that is a terminal."""

    def __init__(self) -> None:
        self._status: Status | None = None

    def say(self, step: str, text: str) -> None:
        """One finished step."""
        out.print(f"{step:<10} {text}", markup=False)

    def begin(self, num_devices: int, directory: Path, *, resumed: bool) -> None:
        verb = "resuming in" if resumed else "files in"
        out.print("[bold]Homespun demo[/bold]: ", end="")
        out.print(f"{num_devices} devices and a server, {verb} {directory}", markup=False)

    def people(self, people: People, public_words: int) -> None:
        self.say(
            "text",
            f"{people.num_words:,} words of {len(people.users)} users: {people.origin}; "
            f"a vocabulary of {public_words:,} words from public text",
        )

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show `text`, then what `live` says, while the block runs."""
        with out.status(text) as self._status:
            yield
        self._status = None

    def live(self, devices: Sequence[DemoDevice]) -> None:
        """What the devices are doing at this moment."""
        if self._status is not None:
            states = Counter(device.state() for device in devices)
            self._status.update(", ".join(f"{n} {state}" for state, n in states.most_common()))

    def cast(
        self,
        devices: Sequence[DemoDevice],
        trainers: Sequence[DemoDevice],
        testers: Sequence[DemoDevice],
    ) -> None:
        vanishing = [device.name for device in devices if device.vanish_after]
        self.say("devices", f"{len(trainers)} may train, the other {len(testers)} only test")
        for device in devices:
            if device.script == NEVER_CHARGING:
                self.say("", f"{device.name} is never plugged in")
            elif device.script:
                self.say("", f"{device.name} is on a metered network at first")
            elif device.is_newcomer:
                self.say("", f"{device.name} is new and has written little")
        if vanishing:
            self.say("", f"{', '.join(vanishing)} will vanish once in the middle of a sum")

    def round(
        self,
        view: RoundSummary,
        num_rounds: int,
        before: float | None,
        refusing: Mapping[str, int],
        traffic: tuple[int, int],
        eta_s: float | None,
    ) -> None:
        """One ended round attempt. `before`: top-3 of the round before; `refusing`: devices that will not
        take part now, by reason; `traffic`: bytes up and down so far.
        """
        name = f"{view.round_number:>2}/{num_rounds}"
        if view.checkpoint is None:
            self.say("  round", f"{name}  attempt {view.attempt} {view.state}: {view.reason}")
            return
        refused = ", ".join(f"{count} {reason}" for reason, count in sorted(refusing.items()))
        eta = "" if eta_s is None else f"  ETA {int(eta_s // 60)}:{int(eta_s % 60):02d}"
        self.say(
            "  round",
            f"{name}  {view.num_reported:>2} of {view.num_assigned}"
            + (f"+{view.num_carried}" if view.num_carried else "")
            + " reported"
            + (f", {lost} lost  " if (lost := sum(dropped_out(view))) else "  ")
            + f"top-3 {percent(before):>6} -> {metric(view, 'top3'):>6}  "
            f"{size(traffic[0]):>8} up {size(traffic[1]):>8} down{eta}"
            + (f"  refused: {refused}" if refused else ""),
        )

    def results(self, evaluation: RoundSummary, released: Hash) -> None:
        """The figures on devices that never trained."""
        out.print()
        rows = [
            (
                name,
                percent(share(evaluation, f"{index}.top1")),
                percent(share(evaluation, f"{index}.top3")),
                metric(evaluation, f"{index}.loss"),
                released[:12] if index == 0 else "",
            )
            for name, index in ROWS
        ]
        columns = (
            f"on {evaluation.num_reported} devices that never trained",
            "top-1",
            "top-3",
            "loss",
            "checkpoint",
        )
        print_table(columns, rows, "")
        tokens = evaluation.metrics["0.top1"].count
        self.say("", f"{tokens:,.0f} held-out words; a word outside the vocabulary counts as wrong")

    def step(self, view: ReleaseView, step: ReleaseStep) -> None:
        """One step of a release, and what it rests on."""
        if step.state in QUIET:
            return
        share = (
            f" on {percent(view.request.stages[step.stage].fraction)} of the devices"
            if step.state is ReleaseState.CANARY
            else ""
        )
        self.say(
            "",
            f"{step.state.replace('_', ' ')}{share}" + (f": {step.reason}" if step.reason else ""),
        )
        for found in step.findings:
            self.say("", f"    {describe_finding(found)}, {describe_devices(found)}")

    def cleanliness(self, devices: Sequence[DemoDevice], clock: Clock) -> None:
        """What is left of all sessions on the devices: nothing."""
        proofs = [verify(device.home, clock) for device in devices]
        left = [
            f"{d.name}/{each.path}" for d, p in zip(devices, proofs, strict=True) for each in p.left
        ]
        self.say(
            "verified",
            f"{sum(p.num_files for p in proofs)} files and {sum(p.num_rows for p in proofs):,} rows on "
            f"{len(devices)} devices: "
            + (f"left: {', '.join(left)}" if left else "nothing of any training is left"),
        )

    def groups(self, rounds: Sequence[RoundSummary]) -> None:
        """What the server did with the reports: it opened sums, and nothing else."""
        opened = [g for view in rounds for g in view.groups if g.state is GroupState.OPENED]
        lost = [dropped_out(view) for view in rounds]
        before, between, after = (sum(counts) for counts in zip(*lost, strict=True))
        out.print()
        self.say(
            "secure",
            f"{len(opened)} sums opened, each of at least {min(g.num_masked for g in opened)} devices; "
            f"the server saw no single one of their {sum(g.num_masked for g in opened)} reports",
        )
        self.say(
            "drop-outs",
            f"{before} before sharing keys, {between} before masking: masks recovered from the others; "
            f"{after} after it: still in the sum",
        )

    def traffic(self, devices: Sequence[DemoDevice]) -> None:
        """Bytes per device over the whole run."""
        statuses = [status for device in devices if (status := device.status()) is not None]
        up = sorted(status.bytes_up for status in statuses)
        down = sorted(status.bytes_down for status in statuses)
        memory = max(status.peak_memory_bytes for status in statuses)
        child = max(status.peak_child_memory_bytes for status in statuses)
        middle = len(statuses) // 2
        out.print()
        self.say(
            "traffic",
            f"per device up {size(up[middle])} (at most {size(up[-1])}), "
            f"down {size(down[middle])} (at most {size(down[-1])}); "
            f"largest device process {size(memory)}, largest child that trained {size(child)}",
        )

    def suggestions(self, devices: Sequence[DemoDevice], openings: Sequence[str]) -> None:
        """What some devices suggest, each from its own directory."""
        out.print()
        self.say("offline", "the server is stopped; suggestions come from the devices alone")
        models = [device.models() for device in devices]
        rows = [
            (f"{opening} ...", *(", ".join(s.word for s in m.predict(opening, 3)) for m in models))
            for opening in openings
        ]
        print_table(("after", *(device.name for device in devices)), rows, "")

    def done(self, devices: Sequence[DemoDevice]) -> None:
        """The last lines of a demo that went well."""
        out.print()
        self.say(
            "done", "the model got better, and every device that is ever charged serves it; try"
        )
        able = next(device.root for device in devices if not device.script)
        self.say("", f'./dev homespun device predict --dir {able} "this is the"')
        self.say("", f"./dev homespun device why --dir {able}")
