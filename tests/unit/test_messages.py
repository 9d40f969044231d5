"""Messages are strict: exactly these fields, of exactly these types, or a BadFrame that names the place."""

from __future__ import annotations

import json

import pytest

from homespun.errors import BadFrame
from homespun.protocol import messages
from homespun.protocol.messages import (
    Abort,
    Aggregation,
    Assigned,
    Carried,
    CheckIn,
    CheckInReply,
    Claim,
    ClaimReply,
    Criteria,
    Encoding,
    Enroll,
    Enrolled,
    Offer,
    Receipt,
    Rejected,
    ReleaseManifest,
    ReleaseNotice,
    ReportState,
    RetryWindow,
    Settled,
    SignedRelease,
    TaskKind,
    Waiting,
    decode,
    encode,
)
from homespun.secagg.messages import Terms

HASH = "a" * 64
RETRY = RetryWindow(earliest_s=1.0, latest_s=2.5)
OFFER = Offer(
    task_id="t1",
    task_name="words",
    kind=TaskKind.TRAIN,
    round_number=1,
    attempt=1,
    plan_hash=HASH,
    criteria=Criteria(bucket=messages.Bucket(salt="s", low=0.25)),
    aggregation=Aggregation.PLAIN,
    min_group=3,
    download_bytes=10,
    upload_bytes=20,
)
ASSIGNED = Assigned(
    assignment_id="a1",
    kind=TaskKind.TRAIN,
    round_number=1,
    attempt=1,
    plan_hash=HASH,
    checkpoints=(HASH,),
    encoding=Encoding(clip_norm=1.0, max_weight=0, max_group=3),
    aggregation=Aggregation.PLAIN,
    seed=2**53 - 1,
    deadline_s=60.0,
)
EXAMPLES = (
    Enroll(population="phones", token="secret", public_key="AAAA"),
    Enrolled(device_id="d1", population="phones", publisher_keys=("AAAA",)),
    CheckIn(population="phones", wait_s=20.0),
    CheckInReply(
        offers=(OFFER,), releases=(ReleaseNotice(slot="keyboard", sequence=2),), retry=RETRY
    ),
    Claim(task_id="t1", round_number=1, attempt=2),
    ASSIGNED,
    Waiting(retry=RETRY),
    Rejected(reason="not_drawn", retry=RETRY),
    Receipt(assignment_id="a1", state=ReportState.INCLUDED, digest=HASH, checkpoint=HASH),
    Abort(assignment_id="a1"),
    Carried(
        terms=Terms(
            task="words",
            round_number=2,
            attempt=1,
            checkpoint_hash=HASH,
            plan_hash=HASH,
            bits=16,
            dimension=3,
            num_aux=2,
            schema="s",
            clip=1.0,
            n_min=3,
            n_max=3,
            max_staleness=1,
        ),
        encoding=Encoding(clip_norm=1.0, max_weight=0, max_group=3),
        ancestry=(HASH, HASH),
    ),
    Settled(receipt=Receipt(assignment_id="a1", state=ReportState.LATE)),
    ReleaseManifest(
        population="phones",
        slot="keyboard",
        sequence=1,
        version="1.0",
        plan_hash=HASH,
        checkpoint=HASH,
        issued_at=0.0,
    ),
    SignedRelease(manifest="e30=", signature="AAAA"),
    messages.Watch(slot="keyboard", release_id="r1"),
)
EACH = pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)


@EACH
def test_a_message_survives_the_wire(message):
    assert decode(encode(message), type(message)) == message


@EACH
def test_a_field_too_many_is_named(message):
    data = {**json.loads(encode(message)), "surprise": 1}
    with pytest.raises(BadFrame, match="surprise"):
        decode(json.dumps(data).encode(), type(message))


@EACH
def test_a_missing_field_is_named(message):
    data = json.loads(encode(message))
    field = next(f for f in type(message).__struct_fields__ if f in data)
    del data[field]
    with pytest.raises(BadFrame, match=field):
        decode(json.dumps(data).encode(), type(message))


@EACH
def test_a_wrong_type_is_named(message):
    complete = json.loads(encode(message))
    for field in type(message).__struct_fields__:
        with pytest.raises(BadFrame, match=field):
            decode(json.dumps({**complete, field: {"not": "this"}}).encode(), type(message))


def test_the_bytes_are_canonical():
    assert encode(CheckIn(wait_s=0.5, population="phones")) == (
        b'{"plan_formats":[1],"population":"phones","wait_s":0.5}'
    )


def test_a_place_inside_is_named_too():
    data = json.loads(encode(EXAMPLES[3]))
    data["offers"][0]["criteria"]["bucket"]["high"] = 2
    with pytest.raises(BadFrame, match=r"offers\[.*\]\.criteria\.bucket\.high"):
        decode(json.dumps(data).encode(), CheckInReply)


@pytest.mark.parametrize(
    "reply", [ASSIGNED, Waiting(retry=RETRY), Rejected(reason="round_closed", retry=RETRY)]
)
def test_the_three_answers_to_a_claim_are_told_apart(reply):
    assert json.loads(encode(reply))["type"] == type(reply).__name__.lower()
    assert decode(encode(reply), ClaimReply) == reply


@pytest.mark.parametrize("kind", ['"other"', "1", "null"])
def test_a_fourth_answer_is_refused(kind):
    with pytest.raises(BadFrame, match="type"):
        decode(f'{{"type":{kind}}}'.encode(), ClaimReply)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round_number", 0),
        ("round_number", -1),
        ("round_number", True),
        ("round_number", 1.5),
        ("round_number", "1"),
        ("round_number", 2**53),  # not every language reads it exactly
        ("round_number", 10**30),
        ("wait_s", -0.1),
        ("wait_s", True),
        ("wait_s", 1e10),
        ("wait_s", "5"),
        ("wait_s", None),
        ("task_id", None),
        ("task_id", 5),
    ],
)
def test_numbers_out_of_range_are_named(field, value):
    data = {"task_id": "t1", "round_number": 1, "attempt": 1, field: value}
    with pytest.raises(BadFrame, match=field):
        decode(json.dumps(data).encode(), Claim)


@pytest.mark.parametrize(
    "population",
    ["", "Phones", "-phones", "phones\n", "a/b", "../a", "a b", "é", "a" * 65, "phones\u0000"],
)
def test_names_are_plain_words(population):
    with pytest.raises(BadFrame, match="population"):
        decode(json.dumps({"population": population}).encode(), CheckIn)


@pytest.mark.parametrize("name", ["a", "0", "phones-2.test_x", "a" * 64])
def test_plain_words_are_names(name):
    assert decode(json.dumps({"population": name}).encode(), CheckIn).population == name


@pytest.mark.parametrize("digest", ["A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "g" * 64, ""])
def test_addresses_have_one_form(digest):
    data = {"assignment_id": "a1", "state": "acknowledged", "digest": digest}
    with pytest.raises(BadFrame, match="digest"):
        decode(json.dumps(data).encode(), Receipt)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b'{"population":"\xff"}',
        b'{"population":"\\ud800"}',
        b'{"population":"a"} {}',
        b'{"population":"a","wait_s":NaN}',
        b'{"population":"a","wait_s":Infinity}',
        b'{"population":"a","wait_s":1e400}',
        b"[" * 100_000,
        b'{"population":' + b"[" * 100_000,
        b"null",
        b"[]",
        b'"population"',
    ],
)
def test_what_is_not_a_message_is_a_bad_frame(data):
    with pytest.raises(BadFrame):
        decode(data, CheckIn)


def test_tokens_and_keys_have_a_largest_size():
    for field, size in (("token", 201), ("public_key", 1025)):
        data = {"population": "p", "token": "t", "public_key": "k", field: "x" * size}
        with pytest.raises(BadFrame, match=field):
            decode(json.dumps(data).encode(), Enroll)


@pytest.mark.parametrize("bits", [0, 7, 33, "32", 32.5, True])
def test_an_encoding_has_8_to_32_bits(bits):
    data = {"bits": bits, "clip_norm": 1.0, "max_weight": 0, "max_group": 3}
    with pytest.raises(BadFrame, match="bits"):
        decode(json.dumps(data).encode(), Encoding)


def test_records_do_not_change():
    with pytest.raises(AttributeError):
        EXAMPLES[2].population = "others"  # type: ignore[misc]


def test_every_message_of_the_module_has_an_example():
    """So that a new message cannot escape the tests above."""
    nested = {"Message", "RetryWindow", "Bucket", "Criteria", "Comparison", "ExampleQuery"}
    nested |= {"Encoding", "Offer", "ReleaseNotice"}
    defined = {
        name
        for name, value in vars(messages).items()
        if isinstance(value, type) and issubclass(value, messages.Message)
    }
    assert defined - nested == {type(message).__name__ for message in EXAMPLES}
