"""What a device refuses. The server in these tests lies; each lie has a name."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from homespun.errors import (
    BadRoster,
    BadShare,
    BadSignature,
    GroupTooSmall,
    HomespunError,
    ShapeMismatch,
    SurvivorsChanged,
    TooManyDropOuts,
    WeakTerms,
    WrongStep,
    WrongSurvivors,
    WrongTerms,
)
from homespun.secagg import device
from homespun.secagg.device import Demands
from homespun.secagg.graph import Adversary
from homespun.secagg.messages import Agree, AgreeRequest, MaskInputRequest, UnmaskRequest
from homespun.secagg.transcript import agree_text, bitmap, transcript_hash
from tests.vectors.secagg import STEPS, SimulatedDevice, World, make_terms, make_work


def refuse(error: type[HomespunError], match: str, step: Any, request: Any) -> None:
    """The device raises, and its state is as it was."""
    before = step.__self__.state
    with pytest.raises(error, match=match):
        step(request)
    assert step.__self__.state == before


# --- step 0: the terms --------------------------------------------------------------------------------


def advertise(demands: Demands | None = None, work: dict[str, Any] | None = None, **terms: Any):
    one = SimulatedDevice("one", make_terms())
    mine = changed(make_work(make_terms()), **(work or {}))
    return device.advertise_keys(
        make_terms(**terms), mine, demands or Demands(3), one.identity, one.signer, one.entropy
    )


def test_terms_that_fit():
    state, keys = advertise()
    assert state.keys == keys


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suite", "one-shot"),
        ("task", "other"),
        ("round_number", 8),
        ("attempt", 2),
        ("plan_hash", "d" * 64),
        ("checkpoint_hash", "d" * 64),
        ("bits", 32),
        ("dimension", 6),
        ("num_aux", 3),
        ("schema", "other"),
        ("clip", 4.0),
    ],
)
def test_other_work_than_the_device_did(name, value):
    with pytest.raises(WrongTerms):
        advertise(**{name: value})


@pytest.mark.parametrize(
    ("demands", "terms"),
    [
        (Demands(), {"n_min": 9}),
        (Demands(smallest_group=0), {"n_min": 2}),  # the floor is 3, whatever the policy says
        (Demands(3), {"corrupt_fraction": 0.04}),
        (Demands(3), {"adversary": Adversary.SEMI_HONEST}),
        (Demands(3), {"max_staleness": 1}),
    ],
)
def test_weaker_terms_than_the_device_asks_for(demands, terms):
    with pytest.raises(WeakTerms):
        advertise(demands, **terms)


@pytest.mark.parametrize(("max_staleness", "fits"), [(0, False), (1, False), (2, True)])
def test_mixed_bases_within_the_verified_chain(max_staleness, fits):
    """The device trained from d; b and then c, the head, followed."""
    demands = Demands(3, max_staleness=2)
    work = {"ancestry": ("d" * 64, "b" * 64, "c" * 64)}
    if fits:
        advertise(demands, work, max_staleness=max_staleness)
    else:
        with pytest.raises(WrongTerms):
            advertise(demands, work, max_staleness=max_staleness)


def test_keys_are_fresh_for_every_group():
    one = SimulatedDevice("one", make_terms())
    first, second = one.advertise_keys(one.terms), one.advertise_keys(one.terms)
    assert len({first.c_key, first.s_key, second.c_key, second.s_key}) == 4


# --- step 1: the roster -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_devices", [2, 1001, 0])
def test_a_roster_of_the_wrong_size(num_devices):
    world = World(4)
    request = replace(world.request("share_keys", 0), num_devices=num_devices)
    refuse(GroupTooSmall, "size", world.devices[0].share_keys, request)


def test_fewer_devices_than_n_min():
    world = World(5, n_min=3)
    lone = world.devices[0]
    state = device.load(lone.state)
    lone.state = device.save(replace(state, terms=replace(state.terms, n_min=10)))
    refuse(GroupTooSmall, "size", lone.share_keys, world.request("share_keys", 0))


def test_a_swapped_key():
    world = World(5)
    request = world.request("share_keys", 0)
    entries = list(request.entries)
    thief = replace(entries[2].keys, s_key=entries[3].keys.s_key[::-1])
    entries[2] = replace(entries[2], keys=thief)
    refuse(
        BadRoster, "belong", world.devices[0].share_keys, replace(request, entries=tuple(entries))
    )


def lie_about(world: World, index: int, **keys: Any) -> None:
    """The server puts other keys into its roster, with a root and proofs that fit."""
    world.group.state.roster[index] = replace(world.group.state.roster[index], **keys)
    world.group._build_graph()


@pytest.mark.parametrize(
    "lie", [{"s_key": b"s" * 32}, {"nonce": bytes(16)}, {"signature": bytes(64)}], ids=str
)
def test_a_swapped_key_in_a_root_of_its_own(lie):
    world = World(5)
    lie_about(world, 2, **lie)
    refuse(BadSignature, "device 2", world.devices[0].share_keys, world.request("share_keys", 0))


def test_a_neighbour_with_another_checkpoint():
    """It signed terms of its own, so its neighbours do not go on with it."""
    world = World(5)
    victim = SimulatedDevice("victim", make_terms(checkpoint_hash="d" * 64))
    keys = victim.advertise_keys(victim.terms)
    world.group.state.roster[4] = keys
    world.group.state.roster.sort(key=lambda entry: entry.c_key)
    world.group._build_graph()
    honest = world.devices[0]
    index = world.group.index_of(honest.identity)
    refuse(BadSignature, "verify", honest.share_keys, world.request("share_keys", index))


def test_own_keys_changed():
    world = World(5)
    lie_about(world, 0, nonce=bytes(16))
    refuse(
        BadRoster, "keys were changed", world.devices[0].share_keys, world.request("share_keys", 0)
    )


@pytest.mark.parametrize("index", [1, 4, 5])
def test_another_place_than_its_own(index):
    world = World(5)
    request = replace(world.request("share_keys", 0), index=index)
    with pytest.raises(BadRoster):
        world.devices[0].share_keys(request)


@pytest.mark.parametrize("same", ["identity", "c_key", "s_key"])
def test_a_device_listed_twice(same):
    world = World(5)
    lie_about(world, 2, **{same: getattr(world.group.state.roster[1], same)})
    refuse(BadRoster, "twice", world.devices[0].share_keys, world.request("share_keys", 0))


def test_a_roster_out_of_order():
    """The order is no choice of the server's."""
    world = World(5)
    roster = world.group.state.roster
    roster[1], roster[2] = roster[2], roster[1]
    world.group._build_graph()
    refuse(BadRoster, "out of order", world.devices[0].share_keys, world.request("share_keys", 0))


def test_neighbours_that_the_server_chose():
    world = World(70, corrupt_fraction=0.05, drop_out_fraction=0.1)
    request = world.request("share_keys", 0)
    stranger = next(i for i in range(1, 70) if i not in world.group.graph.neighbours(0))
    fewer = replace(request, entries=request.entries[:-1])
    refuse(BadRoster, "other neighbours", world.devices[0].share_keys, fewer)
    entries = [*request.entries[:-1], world.request("share_keys", stranger).entries[0]]
    entries.sort(key=lambda entry: entry.index)
    others = replace(request, entries=tuple(entries))
    refuse(BadRoster, "other neighbours", world.devices[0].share_keys, others)


# --- step 2: shares of the others ---------------------------------------------------------------------


def test_too_few_neighbours_shared_keys():
    world = World(7).up_to("mask_input")
    request = world.request("mask_input", 0)
    few = replace(request, shared=bitmap({0, 1, 2, 3}, 7), sealed=request.sealed[:3])
    refuse(TooManyDropOuts, "shared keys", world.devices[0].mask_input, few)


def test_too_few_devices_for_the_terms():
    world = World(4, n_min=4).up_to("mask_input")
    request = world.request("mask_input", 0)
    few = replace(request, shared=bitmap({0, 1, 2}, 4), sealed=request.sealed[:2])
    refuse(GroupTooSmall, "shared keys", world.devices[0].mask_input, few)


def test_too_few_neighbours_of_a_ring():
    """As few drop-outs as the whole group bears, and yet too many around one device."""
    world = World(200)
    world.answer("share_keys", 0)
    graph = world.group.graph
    lost = set(graph.neighbours(0)[: graph.shape.max_drop_outs])
    assert len(graph.neighbours(0)) - len(lost) < graph.shape.threshold
    few = MaskInputRequest(shared=bitmap(set(range(200)) - lost, 200), sealed=())
    refuse(TooManyDropOuts, "too few neighbours", world.devices[0].mask_input, few)


def test_too_many_drop_outs_elsewhere_in_a_ring():
    """The device's own neighbours are all there, but the ring may fall apart."""
    world = World(100, corrupt_fraction=0.05, drop_out_fraction=0.1)
    world.answer("share_keys", 0)
    others = [i for i in range(1, 100) if i not in world.group.graph.neighbours(0)]
    few = MaskInputRequest(shared=bitmap(set(range(100)) - set(others[:11]), 100), sealed=())
    refuse(TooManyDropOuts, "too few devices", world.devices[0].mask_input, few)


def test_without_the_device_itself():
    world = World(5).up_to("mask_input")
    request = world.request("mask_input", 0)
    without = replace(request, shared=bitmap({1, 2, 3, 4}, 5))
    refuse(WrongSurvivors, "not among", world.devices[0].mask_input, without)


def test_shares_that_are_missing():
    world = World(5).up_to("mask_input")
    request = world.request("mask_input", 0)
    missing = replace(request, sealed=request.sealed[:-1])
    refuse(BadShare, "missing", world.devices[0].mask_input, missing)


def test_shares_in_another_order():
    world = World(5).up_to("mask_input")
    request = world.request("mask_input", 0)
    swapped = replace(request, sealed=(request.sealed[1], request.sealed[0], *request.sealed[2:]))
    refuse(BadShare, "does not open", world.devices[0].mask_input, swapped)


def test_shares_meant_for_another_device():
    world = World(5).up_to("mask_input")
    request = world.request("mask_input", 0)
    theirs = replace(request, sealed=world.request("mask_input", 1).sealed)
    refuse(BadShare, "does not open", world.devices[0].mask_input, theirs)


def test_a_devices_own_shares_sent_back():
    """Both directions of a pair have keys of their own."""
    world = World(3).up_to("mask_input")
    request = world.request("mask_input", 0)
    own = replace(request, sealed=world.group.state.shared[0].sealed)
    refuse(BadShare, "does not open", world.devices[0].mask_input, own)


def test_shares_of_another_attempt():
    first = World(5).up_to("mask_input")
    second = World(5, attempt=2).up_to("mask_input")
    by_identity = {one.identity: one for one in second.devices.values()}
    one = by_identity[first.devices[0].identity]
    refuse(BadShare, "does not open", one.mask_input, first.request("mask_input", 0))


def test_shares_under_another_transcript():
    """Whatever the server showed one device differently, that device's neighbours cannot open its shares."""
    world = World(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "transcript_hash", lambda *args: transcript_hash(*args)[::-1])
        world.group.share_keys(2, world.answer("share_keys", 2))
    world.run_step("share_keys", [0, 1, 3, 4])
    for index in range(5):
        step = world.devices[index].mask_input
        refuse(BadShare, "does not open", step, world.request("mask_input", index))


def test_another_set_of_sharers_after_the_first():
    world = World(7).up_to("mask_input")
    world.answer("mask_input", 0)
    request = world.request("mask_input", 0)
    other = replace(request, shared=bitmap(range(6), 7), sealed=request.sealed[:-1])
    refuse(WrongStep, "after the first", world.devices[0].mask_input, other)


def test_other_vectors_after_the_first():
    """Their difference would be plain to see."""
    world = World(5).up_to("mask_input")
    one = world.devices[0]
    world.answer("mask_input", 0)
    one.main[0] ^= 1
    refuse(WrongStep, "after the first", one.mask_input, world.request("mask_input", 0))


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("main", np.zeros(6, "<u2")),
        ("main", np.zeros(5, "<u4")),
        ("aux", np.zeros(3, "<u8")),
        ("aux", np.zeros(2, "<i8")),
    ],
)
def test_vectors_that_do_not_fit(name, vector):
    world = World(3).up_to("mask_input")
    setattr(world.devices[0], name, vector)
    refuse(ShapeMismatch, name, world.devices[0].mask_input, world.request("mask_input", 0))


def test_masking_does_not_change_the_vectors():
    world = World(3).up_to("mask_input")
    one = world.devices[0]
    before = one.main.copy(), one.aux.copy()
    masked = world.answer("mask_input", 0)
    assert (one.main == before[0]).all()
    assert (one.aux == before[1]).all()
    assert masked.main != one.main.tobytes()


# --- step 2.5: who survived ---------------------------------------------------------------------------


def survivors(devices: set[int], num_devices: int = 7) -> AgreeRequest:
    return AgreeRequest(survivors=bitmap(devices, num_devices))


@pytest.mark.parametrize(
    ("devices", "error", "match"),
    [
        ({1, 2, 3, 4, 5, 6}, WrongSurvivors, "not among"),
        ({0, 1, 2, 3}, TooManyDropOuts, "masked input"),
        ({0, 1}, GroupTooSmall, "masked input"),
    ],
)
def test_survivor_sets_that_cannot_be(devices, error, match):
    world = World(7).up_to("agree")
    refuse(error, match, world.devices[0].agree, survivors(devices))


def test_a_survivor_that_never_shared_keys():
    """Dead in U2 and alive in U3."""
    world = World(7)
    world.run_step("share_keys", [0, 1, 2, 3, 4, 5])
    world.run_step("mask_input", [0, 1, 2, 3, 4, 5])
    refuse(WrongSurvivors, "never shared", world.devices[0].agree, survivors(set(range(7))))


def test_survivors_that_are_not_in_the_roster():
    world = World(7).up_to("agree")
    refuse(WrongSurvivors, "roster", world.devices[0].agree, AgreeRequest(survivors=b"\xff"))


def test_another_survivor_set_to_agree_to():
    world = World(7).up_to("agree")
    one = world.devices[0]
    first = one.agree(survivors({0, 1, 2, 3, 4, 5, 6}))
    refuse(SurvivorsChanged, "after the first", one.agree, survivors({0, 1, 2, 3, 4, 5}))
    assert one.agree(survivors({0, 1, 2, 3, 4, 5, 6})) == first


# --- step 3: unmasking --------------------------------------------------------------------------------


def lying_request(world: World, devices: set[int], signed: set[int] | None = None) -> UnmaskRequest:
    """Neighbours who conspire with the server sign whatever set it likes."""
    text = agree_text(world.group.transcript, bitmap(range(7), 7), bitmap(signed or devices, 7))
    signers = range(1, 7)
    return UnmaskRequest(
        survivors=bitmap(devices, 7),
        signers=bitmap(signers, 7),
        signatures=tuple(world.devices[signer].signer.sign(text) for signer in signers),
    )


def test_a_device_both_alive_and_dead():
    """Agreed to be alive, asked for as dead: with both shares its contribution would be open."""
    world = World(7).up_to("unmask")
    one = world.devices[0]
    refuse(SurvivorsChanged, "after the first", one.unmask, lying_request(world, set(range(6))))


def test_another_survivor_set_after_the_answer():
    world = World(7).up_to("unmask")
    first = world.answer("unmask", 0)
    one = world.devices[0]
    refuse(SurvivorsChanged, "after the first", one.unmask, lying_request(world, set(range(6))))
    assert one.unmask(world.request("unmask", 0)) == first


def test_the_answer_is_in_the_state_before_it_is_sent():
    world = World(7).up_to("unmask")
    answer = world.answer("unmask", 0)
    state = device.load(world.devices[0].state)
    assert isinstance(state, device.Answered)
    assert state.unmask == answer


def test_neighbours_who_were_told_another_set():
    world = World(7).up_to("unmask")
    lie = lying_request(world, set(range(7)), signed=set(range(6)))
    refuse(BadSignature, "too few", world.devices[0].unmask, lie)


def test_too_few_signatures():
    world = World(7).up_to("unmask")
    request = world.request("unmask", 0)
    few = replace(request, signers=bitmap({1, 2, 3}, 7), signatures=request.signatures[:3])
    refuse(BadSignature, "too few", world.devices[0].unmask, few)  # 3 and its own: t is 5
    enough = replace(request, signers=bitmap({1, 2, 3, 4}, 7), signatures=request.signatures[:4])
    world.devices[0].unmask(enough)


def test_forged_signatures():
    world = World(7).up_to("unmask")
    request = world.request("unmask", 0)
    forged = replace(request, signatures=(bytes(64),) * 6)
    refuse(BadSignature, "too few", world.devices[0].unmask, forged)


def test_a_lost_neighbours_signature_does_not_count():
    world = World(7).up_to("mask_input")
    for step in ("mask_input", "agree"):
        world.run_step(step, range(6))
    request = world.request("unmask", 0)
    text = agree_text(world.group.transcript, bitmap(range(7), 7), bitmap(range(6), 7))
    lie = replace(
        request,
        signers=bitmap({1, 2, 3, 6}, 7),
        signatures=(*request.signatures[:3], world.devices[6].signer.sign(text)),
    )
    refuse(BadSignature, "too few", world.devices[0].unmask, lie)


def test_one_signature_counts_once():
    world = World(7).up_to("unmask")
    request = world.request("unmask", 0)
    copies = replace(request, signatures=request.signatures[:1] * 6)
    refuse(BadSignature, "too few", world.devices[0].unmask, copies)


def test_the_devices_own_signature_counts_once():
    world = World(7).up_to("unmask")
    request = world.request("unmask", 0)
    own = world.group.state.agreed[0].signature
    few = replace(
        request,
        signers=bitmap({0, 1, 2, 3}, 7),
        signatures=(own, *request.signatures[:3]),
    )
    refuse(BadSignature, "too few", world.devices[0].unmask, few)


def test_signatures_without_a_signer():
    world = World(7).up_to("unmask")
    request = replace(world.request("unmask", 0), signers=bitmap({1}, 7))
    refuse(BadSignature, "missing", world.devices[0].unmask, request)


def test_no_answer_holds_both_shares_of_anybody():
    world = World(7)
    world.run_step("share_keys", range(7))
    world.run_step("mask_input", [0, 1, 2, 3, 4, 6])
    world.run_step("agree", [0, 1, 2, 3, 4, 6])
    answer = world.answer("unmask", 0)
    state = device.load(world.devices[0].state)
    assert isinstance(state, device.Answered)
    for owner, given in enumerate(answer.shares):
        both = state.shares[owner]
        assert given == (both[:32] if owner == 5 else both[32:])


# --- order and repetition -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", STEPS)
def test_requests_that_come_too_early(at):
    """A device that waits for step `at` is asked for every later one."""
    world, behind = World(5), 0
    held = world.devices[behind].state
    for step in STEPS:
        if step == at:
            held = world.devices[behind].state
        world.run_step(step, world.devices)
    world.devices[behind].state = held
    for later in STEPS[STEPS.index(at) + 1 :]:
        refuse(
            WrongStep,
            "too early",
            getattr(world.devices[behind], later),
            world.request(later, behind),
        )


@pytest.mark.parametrize("step", STEPS)
def test_a_repeated_request_gets_the_same_answer(step):
    """At once, and again when the device is already at the end."""
    world = World(5).up_to(step)
    request = world.request(step, 0)
    repeat = getattr(world.devices[0], step)
    first = repeat(request)
    assert repeat(request) == first
    for later in STEPS[STEPS.index(step) :]:
        world.run_step(later, world.devices)
    assert repeat(request) == first
    assert isinstance(device.load(world.devices[0].state), device.Answered)


def test_a_second_roster():
    world = World(5).up_to("mask_input")
    other = World(6)
    refuse(WrongStep, "another roster", world.devices[0].share_keys, other.request("share_keys", 0))


@pytest.mark.parametrize("step", ["advertise_keys", *STEPS])
def test_the_state_survives_its_bytes(step):
    world = World(4)
    if step != "advertise_keys":
        world.up_to(step).run_step(step, world.devices)
    state = device.load(world.devices[0].state)
    assert device.load(device.save(state)) == state


def test_messages_have_no_other_fields():
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"signature":"' + b"A" * 86 + b'==","extra":1}', type=Agree)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"signature":"AAAA"}', type=Agree)
