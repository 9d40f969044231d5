"""Ids of a vocabulary, and what a damaged file is told."""

import json

import pytest

from homespun.corpora import Vocabulary
from homespun.corpora.vocabulary import FIRST_WORD_ID, MAX_BYTES, MAX_SIZE
from homespun.errors import InvalidCorpus

TEXTS = ["The cat saw the dog. The dog ran.", "A cat, a dog and THE bird!"]


def test_words_rank_by_frequency_then_alphabet() -> None:
    vocabulary = Vocabulary.build(TEXTS, 24)
    assert vocabulary.words == ("the", "dog", "a", "cat", "and", "bird", "ran", "saw")
    assert Vocabulary.build(TEXTS, 19).words == ("the", "dog", "a")


def test_encode_starts_each_sentence_and_marks_unknown_words() -> None:
    vocabulary = Vocabulary.build(TEXTS, 19)
    assert vocabulary.encode("The dog, os.path. A zebra!") == [2, 16, 17, 4, 1, 3, 2, 18, 1, 7]
    assert vocabulary.encode("42") == []


def test_the_size_is_definite_when_words_are_few() -> None:
    vocabulary = Vocabulary.build(["only three words"], 4000)
    assert len(vocabulary) == vocabulary.size == 4000
    assert [vocabulary.decode(i) for i in (0, 1, 2, 3, 8, 9, 16, 18, 19, 3999)] == [
        "<pad>", "<unk>", "<s>", ".", "?", "<unk>", "only", "words", "<unk>", "<unk>",
    ]  # fmt: skip
    assert Vocabulary.from_bytes(vocabulary.to_bytes()) == vocabulary


def test_named_ids() -> None:
    vocabulary = Vocabulary.build(TEXTS, 30)
    assert (vocabulary.pad_id, vocabulary.unk_id, vocabulary.bos_id) == (0, 1, 2)
    assert vocabulary.first_word_id == FIRST_WORD_ID == 16


def test_completion_keeps_the_models_order() -> None:
    vocabulary = Vocabulary.build(TEXTS, 24)
    assert list(vocabulary.complete("A", [20, 17, 3, 18, 23])) == ["and", "a"]
    assert list(vocabulary.complete("", [17, 1, 9])) == ["dog"]


@pytest.mark.parametrize("size", [-1, 0, 16, MAX_SIZE + 1])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(InvalidCorpus, match=f"cannot have {size} ids"):
        Vocabulary.build(TEXTS, size)


def test_text_without_words_is_refused() -> None:
    with pytest.raises(InvalidCorpus, match="no words"):
        Vocabulary.build(["", "42 os.path"], 100)


@pytest.mark.parametrize("token_id", [-1, 24])
def test_ids_out_of_range_are_refused(token_id: int) -> None:
    with pytest.raises(InvalidCorpus, match=f"token id {token_id} "):
        Vocabulary.build(TEXTS, 24).decode(token_id)


def _document(**changes: object) -> bytes:
    return json.dumps(json.loads(Vocabulary.build(TEXTS, 24).to_bytes()) | changes).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not of the format"),
        (_document(format="homespun-vocabulary-2"), "not of the format"),
        (_document(marks=["."]), "our marks"),
        (_document(size="24"), "a size"),
        (_document(size=True), "a size"),
        (_document(size=17), "do not fit"),
        (_document(words={}), "words"),
        (_document(words=[]), "do not fit"),
        (_document(words=["a", "a"]), "twice"),
        (_document(words=["a", 1]), "never yields"),
        (_document(words=["two words"]), "never yields"),
        (_document(words=["Upper"]), "never yields"),
        (_document(words=[","]), "never yields"),
        (_document(words=["<unk>"]), "never yields"),
        (_document(words=["w" * 33]), "never yields"),
        (b" " * (MAX_BYTES + 1), "at most"),
    ],
)
def test_damaged_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidCorpus, match=message):
        Vocabulary.from_bytes(data)


def test_unchanged_document_is_accepted() -> None:
    """Guards the test above: what it changes is the only reason for its refusals."""
    assert Vocabulary.from_bytes(_document()) == Vocabulary.build(TEXTS, 24)
