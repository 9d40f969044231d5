"""The tokenizer's table, row by row."""

import time

import pytest

from homespun.corpora.tokenizer import MARKS, normalise, sentences, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Thank you, Anna!", [["thank", "you", ",", "anna", "!"]]),
        ("Don't; it’s 'quoted'.", [["don't", ";", "it's", "quoted", "."]]),
        ("well-known and/or (both)", [["well", "known", "and", "or", "both"]]),
        ("Really?! Yes...", [["really", "?"], ["yes", "."]]),
        ("wait… what??", [["wait", "."], ["what", "?"]]),
        ("see e.g. this, i.e. that", [["see", "e.g.", "this", ",", "i.e.", "that"]]),
        ("Straße, ΣΊΣΥΦΟΣ, \ufb01ne, नमस्ते", [["straße", ",", "σίσυφος", ",", "fine", ",", "नमस्ते"]]),
        ("one\nline\n\nanother", [["one", "line"], ["another"]]),
        ("list:\n- first\n* second", [["list", ":"], ["first"], ["second"]]),
    ],
)
def test_language_becomes_words_and_marks(text: str, expected: list[list[str]]) -> None:
    assert sentences(text) == expected


@pytest.mark.parametrize(
    "secret",
    [
        "0171 5550199", "+49 171/5550199", "12:30", "2026-11-22", "1,000.50", "$99.95", "50%",
        "4111 1111 1111 1111", "anna@example.org", "<anna.b@mail.example.org>", "a@b", "@anna",
        "anna＠example．org", "https://example.org/a?token=abc", "www.example.org/secret",
        "HTTP://EXAMPLE.ORG", "docs.example.org/page", "mailto:anna@example.org",
    ],
)  # fmt: skip
def test_what_identifies_a_person_is_dropped(secret: str) -> None:
    assert sentences(f"call me {secret} today.") == [["call", "me", "today", "."]]


@pytest.mark.parametrize(
    "code",
    [
        "os.path.join",
        "utf8",
        "sha256",
        "__init__",
        "snake_case",
        "%s",
        "\\n",
        "x86_64",
        "b2b",
        "w" * 33,
    ],
)
def test_what_is_not_language_is_one_unknown_token(code: str) -> None:
    assert sentences(f"use {code} here") == [["use", "<unk>", "here"]]


def test_words_are_only_words() -> None:
    assert words("Hello, os.path world 42!") == ["hello", "world"]


@pytest.mark.parametrize("text", ["", " \n\n ", "123 456.", "...", "?!", "os.path", "()"])
def test_text_without_a_word_has_no_sentence(text: str) -> None:
    assert sentences(text) == []


def test_there_are_at_most_twelve_marks() -> None:
    assert len(MARKS) <= 12
    assert sentences("a " + " ".join(MARKS))[0][0] == "a"


def test_normalising_composes_what_only_lower_case_has() -> None:
    """J with a caron has no composed capital, j with a caron is one character."""
    assert normalise("J\u030c") == "\u01f0"


def test_normalising_once_is_enough_for_every_character() -> None:
    characters = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    assert [c for c in characters if normalise(normalise(c)) != normalise(c)] == []


@pytest.mark.parametrize("piece", ["a,a@", "a.", "www.)", "\n ", "://", "a/", "1,", "'", "_.", "@"])
def test_hostile_text_takes_linear_time(piece: str) -> None:
    """A quadratic pattern would need minutes for this; the bound is generous on purpose."""
    start = time.process_time()
    sentences(piece * (200_000 // len(piece)))
    assert time.process_time() - start < 5
