"""What an error says."""

from __future__ import annotations

import json

import pytest

from homespun.errors import BadFrame, Expired, HomespunError, InvalidCorpus, InvalidInput
from homespun.protocol.problem import encode_problem, error_from_problem


def test_the_text_is_message_and_hint():
    assert str(InvalidCorpus("line 3 is empty")) == "line 3 is empty"
    assert str(InvalidCorpus("line 3 is empty", hint="remove it")) == "line 3 is empty (remove it)"


def test_the_parts_stay_apart():
    error = InvalidCorpus("line is empty", hint="remove it", line=3, expected="text")
    assert (error.message, error.hint) == ("line is empty", "remove it")
    assert error.details == {"line": 3, "expected": "text"}


def test_a_parent_stands_for_its_children_and_lends_the_status():
    assert isinstance(InvalidCorpus("x"), InvalidInput)
    assert (InvalidCorpus.code, InvalidCorpus.http_status) == ("invalid_corpus", 422)
    assert HomespunError.http_status == 500


def test_an_error_survives_the_wire():
    sent = Expired("round 3 is over", hint="wait for the next", round=3, state="late")
    got = error_from_problem(410, encode_problem(sent))
    assert (type(got), str(got), got.details) == (Expired, str(sent), sent.details)


def test_a_problem_document_has_the_members_of_rfc_9457():
    problem = json.loads(encode_problem(BadFrame("cut short", expected=12)))
    assert (problem["type"], problem["title"]) == ("urn:homespun:bad_frame", "bad frame")
    assert (problem["status"], problem["detail"]) == (400, "cut short")


@pytest.mark.parametrize("key", ["message", "self", "hint", "details", "code"])
def test_no_name_of_a_detail_breaks_the_reader(key):
    body = json.dumps({"status": 400, "code": "bad_frame", "hint": "h", "details": {key: 1}})
    error = error_from_problem(400, body.encode())
    assert isinstance(error, BadFrame)
    assert (error.message, error.hint, error.details) == ("bad_frame", "h", {key: 1})


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"\xff", b"[]", b'{"status":"x","code":5}', b'{"status":500}']
)
def test_an_answer_that_is_no_problem_document_is_an_error_all_the_same(body):
    error = error_from_problem(503, body)
    assert type(error) is HomespunError
    assert error.details == {"status": 503}


def test_a_code_from_the_future_is_an_error_all_the_same():
    error = error_from_problem(400, b'{"status":400,"code":"new","detail":"d","extra":[]}')
    assert (type(error), error.message) == (HomespunError, "d")
