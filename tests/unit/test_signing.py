"""Signed requests: whatever is tampered with, the signature no longer holds."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homespun.errors import NotAuthentic
from homespun.protocol.signing import (
    DEVICE_HEADER,
    MAX_SKEW_S,
    SIGNATURE_HEADER,
    TIME_HEADER,
    device_id,
    request_headers,
    request_text,
    verify,
    verify_request,
)
from homespun.tensors.codec import digest

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
NOW = 1_700_000_000.25
BODY = b'{"population":"phones"}'
HEADERS = request_headers(KEY, device_id(PUBLIC), "POST", "/v1/check-in", NOW, BODY)
REQUEST: dict[str, Any] = {
    "public_key": PUBLIC,
    "method": "POST",
    "path": "/v1/check-in",
    "time": HEADERS[TIME_HEADER],
    "signature": HEADERS[SIGNATURE_HEADER],
    "body_hash": digest(BODY),
    "now": NOW,
}


def test_the_text_on_paper():
    assert request_text("post", "/v1/check-in", "1700000000.250", digest(b"")) == (
        b"homespun-request-v1\nPOST\n/v1/check-in\n1700000000.250\n"
        b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


def test_the_headers():
    assert HEADERS[DEVICE_HEADER] == hashlib.sha256(PUBLIC).hexdigest()[:32]
    assert HEADERS[TIME_HEADER] == "1700000000.250"
    assert len(HEADERS[SIGNATURE_HEADER]) == 88  # base64 of 64 bytes


def test_an_honest_request_verifies():
    verify_request(**REQUEST)
    verify_request(**{**REQUEST, "method": "post"})  # HTTP methods have no case here


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "PUT"},
        {"path": "/v1/claim"},
        {"path": "/v1/check-in/"},
        {"path": "/v1/check-in?x=1"},
        {"time": "1700000000.251"},
        {"time": "1700000000.25"},  # the same moment, written otherwise
        {"body_hash": digest(b'{"population":"phonez"}')},
        {"body_hash": digest(b"")},
        {
            "public_key": Ed25519PrivateKey.from_private_bytes(bytes(32))
            .public_key()
            .public_bytes_raw()
        },
        {"public_key": b""},
        {"public_key": PUBLIC[:-1]},
        {"signature": ""},
        {"signature": "not base64!"},
        {"signature": "é"},
        {"signature": HEADERS[SIGNATURE_HEADER][:-4]},
        {"signature": "A" + HEADERS[SIGNATURE_HEADER][1:]},
        {"signature": HEADERS[SIGNATURE_HEADER] + "\n"},
    ],
)
def test_any_change_is_refused(changes):
    assert {**REQUEST, **changes} != REQUEST
    with pytest.raises(NotAuthentic, match="does not verify"):
        verify_request(**{**REQUEST, **changes})


@pytest.mark.parametrize("skew_s", [0.0, MAX_SKEW_S, -MAX_SKEW_S])
def test_a_clock_that_is_nearly_right_is_accepted(skew_s):
    verify_request(**{**REQUEST, "now": NOW + skew_s})


@pytest.mark.parametrize("skew_s", [MAX_SKEW_S + 1, -MAX_SKEW_S - 1, 86_400.0])
def test_a_wrong_clock_is_told_so(skew_s):
    with pytest.raises(NotAuthentic, match="set the clock"):
        verify_request(**{**REQUEST, "now": NOW + skew_s})


@pytest.mark.parametrize("time", ["nan", "inf", "-inf", "1e999"])
def test_a_time_that_is_no_time_is_refused_even_when_signed(time):
    signed = request_headers(KEY, "", "POST", "/v1/check-in", float(time), BODY)
    with pytest.raises(NotAuthentic, match="too far"):
        verify_request(**{**REQUEST, "time": time, "signature": signed[SIGNATURE_HEADER]})


@pytest.mark.parametrize("time", ["", "now", "1700000000,25", "0x1"])
def test_a_time_that_is_no_number_is_refused(time):
    with pytest.raises(NotAuthentic, match=f"{TIME_HEADER} header is not a number"):
        verify_request(**{**REQUEST, "time": time})


def test_a_request_is_no_release():
    """The first line says what is signed, so that one signature cannot stand for another."""
    assert request_text("GET", "/", "0", "").startswith(b"homespun-request-v1\n")
    with pytest.raises(NotAuthentic):
        verify(PUBLIC, HEADERS[SIGNATURE_HEADER], b"homespun-release-v1\n" + BODY)
