"""What the server refuses, what it keeps, and that it can be restarted at any time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from msgspec.structs import replace

from homespun.errors import (
    BadRoster,
    BadShare,
    BadSignature,
    GroupTooSmall,
    HomespunError,
    ShapeMismatch,
    TooManyDropOuts,
    WrongStep,
)
from homespun.secagg.messages import Agree, MaskedInput
from homespun.secagg.server import Group
from tests.vectors.secagg import STEPS, SimulatedDevice, World, make_terms


def totals(world: World) -> tuple[list[int], list[int]]:
    return world.group.main.tolist(), world.group.aux.tolist()


def refuse(world: World, error: type[HomespunError], match: str, step: str, *args: Any) -> None:
    """The server raises, and neither its state nor its sums change."""
    before = world.group.save(), totals(world)
    with pytest.raises(error, match=match):
        getattr(world.group, step)(*args)
    assert (world.group.save(), totals(world)) == before


# --- step 0 -------------------------------------------------------------------------------------------


def advertised(num_devices: int, **terms: Any) -> tuple[Group, list[Any]]:
    group = Group(make_terms(**terms))
    answers = [
        SimulatedDevice(f"d{i}", group.state.terms).advertise_keys(group.state.terms)
        for i in range(num_devices)
    ]
    for answer in answers:
        group.advertise_keys(answer)
    return group, answers


def test_too_few_devices_for_a_group():
    group, _ = advertised(4, n_min=5)
    with pytest.raises(GroupTooSmall):
        group.close_advertise_keys()


def test_a_full_group():
    group, _ = advertised(3, n_max=3)
    late = SimulatedDevice("late", group.state.terms).advertise_keys(group.state.terms)
    with pytest.raises(WrongStep, match="full"):
        group.advertise_keys(late)


def test_keys_that_are_repeated_changed_stolen_or_unsigned():
    group, answers = advertised(3)
    group.advertise_keys(answers[1])
    assert len(group.state.roster) == 3
    with pytest.raises(WrongStep, match="after the first"):
        group.advertise_keys(replace(answers[1], nonce=bytes(16)))
    thief = SimulatedDevice("thief", group.state.terms).advertise_keys(group.state.terms)
    with pytest.raises(BadRoster, match="same key"):
        group.advertise_keys(replace(thief, s_key=answers[0].s_key))
    with pytest.raises(BadSignature):
        group.advertise_keys(replace(thief, nonce=bytes(16)))
    other = SimulatedDevice("other", make_terms(checkpoint_hash="d" * 64))
    with pytest.raises(BadSignature):
        group.advertise_keys(other.advertise_keys(other.terms))


def test_the_roster_does_not_depend_on_the_order_of_arrival():
    group, answers = advertised(5)
    other = Group(group.state.terms)
    for answer in reversed(answers):
        other.advertise_keys(answer)
    group.close_advertise_keys()
    other.close_advertise_keys()
    assert group.transcript == other.transcript
    with pytest.raises(BadRoster, match="not in the roster"):
        group.index_of(bytes(32))


# --- later steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_repeated_answer_changes_nothing(step):
    world = World(4).up_to(step)
    answer = world.answer(step, 1)
    receive = getattr(world.group, step)
    receive(1, answer)
    state, before = world.group.save(), totals(world)
    receive(1, answer)
    assert (world.group.save(), totals(world)) == (state, before)


@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_repeated_answer_is_known_even_when_the_step_is_over(step):
    world = World(4).up_to(step)
    answer = world.answer(step, 1)
    world.run_step(step, range(4))
    before = totals(world)
    getattr(world.group, step)(1, answer)
    assert totals(world) == before


@pytest.mark.parametrize("step", STEPS)
def test_another_answer_after_the_first(step):
    world = World(4).up_to(step)
    first, other = world.answer(step, 1), world.answer(step, 2)
    getattr(world.group, step)(1, first)
    refuse(world, WrongStep, "after the first", step, 1, other)


@pytest.mark.parametrize("step", STEPS[:-1])
def test_answers_that_come_late(step):
    world = World(7).up_to(step)
    late = world.answer(step, 6)
    world.run_step(step, range(6))
    refuse(world, WrongStep, "not at", step, 6, late)


@pytest.mark.parametrize("step", STEPS)
def test_a_device_that_is_not_there(step):
    world = World(4).up_to(step)
    refuse(world, BadRoster, "no such device", step, 4, world.answer(step, 0))


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_device_that_missed_an_earlier_step(step):
    """It takes no further part; what it sends all the same is refused."""
    world = World(7)
    for earlier in STEPS[: STEPS.index(step)]:
        world.run_step(earlier, range(6))
    refuse(world, WrongStep, "this device", step, 6, world.answer(step, 5))


def test_wrong_numbers_of_shares():
    world = World(4)
    answer = world.answer("share_keys", 0)
    few = replace(answer, sealed=answer.sealed[:-1])
    refuse(world, BadShare, "one share per", "share_keys", 0, few)
    world = World(4).up_to("unmask")
    answer = world.answer("unmask", 0)
    few = replace(answer, shares=answer.shares[:-1])
    refuse(world, BadShare, "one share per", "unmask", 0, few)


@pytest.mark.parametrize("part", ["main", "aux", "signature"])
def test_masked_input_that_was_changed_on_the_way(part):
    world = World(4).up_to("mask_input")
    answer = world.answer("mask_input", 0)
    value = getattr(answer, part)
    changed = replace(answer, **{part: bytes([value[0] ^ 1]) + value[1:]})
    refuse(world, BadSignature, "masked input", "mask_input", 0, changed)
    refuse(world, BadSignature, "masked input", "mask_input", 1, answer)


@pytest.mark.parametrize("part", ["main", "aux"])
def test_masked_input_that_was_cut_short(part):
    world = World(4).up_to("mask_input")
    answer = world.answer("mask_input", 0)
    short = replace(answer, **{part: getattr(answer, part)[:-2]})
    refuse(world, ShapeMismatch, "length", "mask_input", 0, short)


def test_agreement_to_another_set():
    world = World(4).up_to("agree")
    other = world.devices[0].signer.sign(b"something else")
    refuse(world, BadSignature, "survivor set", "agree", 0, Agree(signature=other))


@pytest.mark.parametrize("step", STEPS[:-1])
def test_steps_that_close_too_early(step):
    world = World(7).up_to(step)
    for index in range(4):  # t is 5
        getattr(world.group, step)(index, world.answer(step, index))
    refuse(world, TooManyDropOuts, "too few", f"close_{step}")


def test_more_drop_outs_than_a_ring_bears():
    world = World(100, corrupt_fraction=0.05, drop_out_fraction=0.1)
    shared = world.answer("share_keys", 0)
    world.group.state.shared = dict.fromkeys(range(11, 100), shared)
    refuse(world, TooManyDropOuts, "too few devices", "close_share_keys")
    world.group.state.shared = dict.fromkeys(range(10, 100), shared)
    world.group.close_share_keys()


def test_too_few_neighbours_around_one_device_of_a_ring():
    world = World(200)
    shared = world.answer("share_keys", 0)
    graph = world.group.graph
    lost = set(graph.neighbours(0)[: graph.shape.max_drop_outs])
    world.group.state.shared = dict.fromkeys(set(range(200)) - lost, shared)
    refuse(world, TooManyDropOuts, "too few neighbours", "close_share_keys")


def test_too_few_survivors_for_the_terms():
    world = World(7, n_min=6).up_to("mask_input")
    for index in range(5):
        world.group.mask_input(index, world.answer("mask_input", index))
    refuse(world, GroupTooSmall, "masked input", "close_mask_input")


# --- the sum ------------------------------------------------------------------------------------------


def test_no_sum_before_its_time():
    world = World(4).up_to("agree")
    assert not world.group.can_open()
    refuse(world, WrongStep, "not at", "open_sum")


def test_the_sum_opens_as_soon_as_every_secret_does():
    world = World(7).up_to("unmask")
    for index in range(5):
        assert not world.group.can_open()
        refuse(world, TooManyDropOuts, "gave up their shares", "open_sum")
        world.group.unmask(index, world.answer("unmask", index))
    assert world.group.can_open()
    main, aux = world.group.open_sum()
    assert (main.tolist(), aux.tolist()) == world.plain_sum(range(7))


def with_wrong_shares(num_answers: int, liars: tuple[int, ...], owners: tuple[int, ...]) -> World:
    """Seven devices of which the last is lost before masking; `liars` give wrong shares of `owners`' secrets."""
    world = World(7).up_to("mask_input")
    for step in ("mask_input", "agree"):
        world.run_step(step, range(6))
    for index in range(num_answers):
        answer = world.answer("unmask", index)
        if index in liars:
            shares = list(answer.shares)
            for owner in owners:
                shares[owner] = bytes([index]) * 32
            answer = replace(answer, shares=tuple(shares))
        world.group.unmask(index, answer)
    return world


@pytest.mark.parametrize("owner", [2, 6])
def test_a_wrong_share_is_noticed(owner):
    """Of a survivor's seed, by its commitment; of a lost device's mask key, by the public one."""
    world = with_wrong_shares(5, (1,), (owner,))
    assert world.group.can_open()
    with pytest.raises(BadShare, match="another secret") as caught:
        world.group.open_sum()
    assert caught.value.details["device"] == owner


@pytest.mark.parametrize("liar", range(6))
def test_one_device_with_wrong_shares_does_no_harm_if_another_answers(liar):
    world = with_wrong_shares(6, (liar,), tuple(range(7)))
    main, aux = world.group.open_sum()
    assert (main.tolist(), aux.tolist()) == world.plain_sum(range(6))


def test_more_wrong_shares_than_spare_ones_open_nothing():
    world = with_wrong_shares(6, (0, 4), (2,))
    with pytest.raises(BadShare, match="another secret"):
        world.group.open_sum()


@pytest.mark.parametrize("num_parts", [2, 3, 50])
def test_unmasking_in_threads(num_parts):
    world = World(12, dimension=1000)
    survivors = world.run({0: "mask_input", 5: "agree", 7: "mask_input"})
    with ThreadPoolExecutor(4) as pool:
        main, aux = world.group.open_sum(pool.map, num_parts)
    assert (main.tolist(), aux.tolist()) == world.plain_sum(survivors)


def test_opening_twice_gives_the_same():
    world = World(4)
    world.run({})
    assert [part.tolist() for part in world.group.open_sum()] == [
        part.tolist() for part in world.group.open_sum()
    ]


def test_the_server_restarts_between_any_two_answers():
    world = World(5)
    for step in STEPS:
        for index in world.devices:
            getattr(world.group, step)(index, world.answer(step, index))
            saved = world.group.save()
            world.group = Group.load(saved, world.group.main.copy(), world.group.aux.copy())
            assert world.group.save() == saved
        if step != "unmask":
            getattr(world.group, f"close_{step}")()
    main, aux = world.group.open_sum()
    assert (main.tolist(), aux.tolist()) == world.plain_sum(range(5))


def test_no_masked_vector_is_kept():
    world = World(5, dimension=500, num_aux=8).up_to("mask_input")
    answers: list[MaskedInput] = []
    for index in world.devices:
        answers.append(world.answer("mask_input", index))
        world.group.mask_input(index, answers[-1])
    kept = world.group.save()
    assert len(kept) < 5 * 1500  # keys and shares only
    for answer in answers:
        assert answer.main[:32] not in kept
        assert answer.aux[:32] not in kept


def test_what_the_server_holds_before_unmasking_says_nothing_about_one_device():
    """Its state has no seed, no key and no vector in clear, of any device."""
    world = World(5).up_to("unmask")
    kept = world.group.save()
    for one in world.devices.values():
        secrets = one.draws["advertise_keys"]
        for start in (0, 64, 128):  # c secret, s secret, seed
            assert bytes.fromhex(secrets[start : start + 64]) not in kept
        assert one.main.tobytes() not in kept
