"""The demo's releases: tested by devices that did not train, on half of all devices, then on all; or taken back."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from homespun.cli.demo import ingredients
from homespun.cli.demo.devices import MIN_GROUP, NEVER_CHARGING, DemoDevice, members
from homespun.cli.demo.owners import Typists, serving
from homespun.cli.demo.stage import (
    GROUPS,
    PATIENCE_S,
    POLL_S,
    POPULATION,
    RETRY,
    SELECTION_S,
    Stage,
    push,
    tick,
)
from homespun.cli.releases import follow_release
from homespun.cli.trial import try_out
from homespun.errors import HomespunError
from homespun.protocol import release_request
from homespun.protocol.messages import Bucket, Criteria, encode
from homespun.protocol.release import ReleaseState
from homespun.protocol.release_request import EvaluationSpec, ReleaseRequest, Reports, WatchSpec
from homespun.protocol.views import ReleaseView, TaskView
from homespun.tensors import codec
from homespun.types import Hash

SLOT = "default"
ALPHA = 0.1
DIFFERENCE_CLIP = 0.02
STAGES = (release_request.Stage(fraction=0.5, soak_s=2.0),)
WATCH = WatchSpec(primary=0.4, latency_s=0.06, failed=0.6)
"""Margins as wide as so few devices need: with a dozen on each side only large differences show."""


def ship(
    stage: Stage,
    trained: Hash,
    tested: TaskView,
    bucket: Bucket,
    testers: Sequence[DemoDevice],
) -> bool:
    """Three releases: one that fails in use only, the trained model, a worse one. Whether all went as they should."""
    client, plan, screen = stage.client, stage.plan, stage.screen
    model = codec.decode_tree(client.checkpoint(trained))
    word = ingredients.word_unknown_to(plan, testers)
    fragile = push(client, stage.plan_hash, ingredients.fragile_checkpoint(plan, model, word))
    worse = push(client, stage.plan_hash, ingredients.noisy_checkpoint(model, stage.settings.seed))
    typists = Typists(stage.devices, SLOT, word)

    screen.say("release", f"2-fragile: as good as the trained model, until somebody types {word!r}")
    view = release(stage, request(stage, fragile, "2-fragile", bucket), typists)
    if view.state is not ReleaseState.ROLLED_BACK:
        return failed(stage, view, "a release that fails in use was not rolled back")
    if not serve(stage, "1-initial"):
        return False

    screen.say("release", "3-trained: the model that the devices have trained")
    view = release(stage, request(stage, trained, "3-trained", bucket, tested.task_id), typists)
    if view.state is not ReleaseState.DEPLOYED:
        return failed(stage, view, "the trained model was not deployed")
    if not serve(stage, "3-trained"):
        return False

    screen.say("release", "4-noisy: the trained model with noise on its parameters")
    view = release(stage, request(stage, worse, "4-noisy", bucket), typists)
    if view.state is not ReleaseState.REJECTED:
        return failed(stage, view, "a worse model was not rejected")
    return True


def request(
    stage: Stage, checkpoint: Hash, version: str, bucket: Bucket, evidence: str | None = None
) -> ReleaseRequest:
    """What is asked for: evaluated by devices that did not train, then half of all devices, then all."""
    num_testers = len(members(stage.devices, bucket))
    num_devices = sum(device.script != NEVER_CHARGING for device in stage.devices)
    model = codec.decode_tree(stage.client.checkpoint(checkpoint))
    return ReleaseRequest(
        population=POPULATION,
        slot=SLOT,
        plan_hash=stage.plan_hash,
        checkpoint=checkpoint,
        version=version,
        evaluation_task_id=evidence,
        evaluation=EvaluationSpec(
            clip=DIFFERENCE_CLIP,
            most=num_testers,
            reports=reports(num_testers, Criteria(min_examples=1, bucket=bucket)),
        ),
        stages=STAGES,
        watch=msgspec.structs.replace(
            WATCH, most=num_devices, reports=reports(num_devices, Criteria(min_examples=1))
        ),
        alpha=ALPHA,
        trial=try_out(stage.plan, model),
    )


def reports(num_devices: int, criteria: Criteria) -> Reports:
    """A round of all these devices, or of nearly all if they do not come in time."""
    return Reports(
        goal=num_devices,
        minimum=round(0.75 * num_devices),
        min_group=MIN_GROUP,
        groups=GROUPS,
        over_selection=1.0,
        pool_target=num_devices,
        selection_s=SELECTION_S,
        deadline_s=PATIENCE_S,
        retry=RETRY,
        criteria=criteria,
    )


def release(stage: Stage, wanted: ReleaseRequest, typists: Typists | None = None) -> ReleaseView:
    """Ask for a release, unless an earlier run did, and follow it until it stays; a line for each step."""
    known = [view for view in stage.client.releases() if view.version == wanted.version]
    view = known[0] if known else stage.client.create_release(**plain(wanted))
    moved_at = stage.clock.now()

    def look() -> None:
        tick(stage)
        if typists is not None:
            typists.type(view.release_id)
        if stage.clock.now() > moved_at + PATIENCE_S:
            raise HomespunError(
                f"release {wanted.version} does not move", hint="homespun model show tells why"
            )

    with stage.screen.waiting(f"release {wanted.version}"):
        for latest, step in follow_release(stage.client, view.release_id, POLL_S, look):
            view, moved_at = latest, stage.clock.now()
            stage.screen.step(view, step)
    return view


def plain(wanted: ReleaseRequest) -> dict[str, object]:
    """A request as the client takes it."""
    fields: dict[str, object] = msgspec.json.decode(encode(wanted))
    return fields


def failed(stage: Stage, view: ReleaseView, what: str) -> bool:
    """Say what went wrong; False."""
    stage.screen.say("FAILED", f"{what}: {view.version} is {view.state}: {view.reason}")
    return False


def serve(stage: Stage, version: str) -> bool:
    """Wait until every device that is ever charged serves this release; False if patience ends before."""
    able = [device for device in stage.devices if device.script != NEVER_CHARGING]
    deadline = stage.clock.now() + PATIENCE_S
    with stage.screen.waiting(f"devices fetch release {version}"):
        while (num := serving(able, SLOT, version)) < len(able):
            tick(stage)
            if stage.clock.now() > deadline:
                stage.screen.say("FAILED", f"only {num} of {len(able)} devices serve {version}")
                return False
            stage.clock.sleep(0.5)
    away = ", ".join(device.name for device in stage.devices if device not in able)
    rest = f"; {away} was never charging and keeps out of everything" if away else ""
    stage.screen.say("serving", f"{version} on all {num} devices{rest}")
    return True
