"""The fixed list of tokens a next-word model knows, built from public text on the server.

Never from device data: which words a person uses is private, and a vocabulary is sent to everyone.

    id 0            <pad>    fills the rest of a sequence
    id 1            <unk>    a word that is not in the list, or not a word at all
    id 2            <s>      the start of a sentence
    id 3 to 8       . , ; : ! ?
    id 9 to 15      reserved
    id 16 and up    words, the most frequent first, ties in code-point order

The size is definite: a vocabulary built for 4,000 tokens has 4,000 ids even when the text held
fewer words, so that the shape of a model never depends on the text. Ids without a word are never
encoded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from homespun.corpora.tokenizer import MARKS, UNKNOWN, sentences, words
from homespun.errors import InvalidCorpus

PAD_ID = 0
UNK_ID = 1
BOS_ID = 2
FIRST_MARK_ID = 3
FIRST_WORD_ID = 16
MAX_SIZE = 1 << 16
MAX_BYTES = 1 << 22
FORMAT = "homespun-vocabulary-1"


@dataclass(frozen=True)
class Vocabulary:
    """`words[i]` has the id `FIRST_WORD_ID + i`; `size` counts all ids, with a word or without."""

    words: tuple[str, ...]
    size: int
    pad_id: int = field(default=PAD_ID, init=False)
    unk_id: int = field(default=UNK_ID, init=False)
    bos_id: int = field(default=BOS_ID, init=False)
    first_word_id: int = field(default=FIRST_WORD_ID, init=False)
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not FIRST_WORD_ID < self.size <= MAX_SIZE:
            raise InvalidCorpus(
                f"a vocabulary cannot have {self.size} ids",
                hint=f"choose a size from {FIRST_WORD_ID + 1} to {MAX_SIZE}",
            )
        if not 0 < len(self.words) <= self.size - FIRST_WORD_ID:
            raise InvalidCorpus(
                f"{len(self.words)} words do not fit a vocabulary of {self.size} ids",
                hint=f"ids below {FIRST_WORD_ID} are reserved; at least one word is needed",
            )
        ids = {word: FIRST_WORD_ID + index for index, word in enumerate(self.words)}
        if len(ids) < len(self.words):
            raise InvalidCorpus("a vocabulary names a word twice")
        ids |= {mark: FIRST_MARK_ID + index for index, mark in enumerate(MARKS)}
        object.__setattr__(self, "_ids", ids)

    @classmethod
    def build(cls, texts: Iterable[str], size: int) -> Vocabulary:
        """The `size - FIRST_WORD_ID` most frequent words of `texts`, which come in any order.

        Raises InvalidCorpus when there is no word in them, or the size is out of range.
        """
        counts = Counter(word for text in texts for word in words(text))
        if not counts:
            raise InvalidCorpus(
                "no words to build a vocabulary from",
                hint="give public text in the users' language",
            )
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(words=tuple(ranked[: max(0, size - FIRST_WORD_ID)]), size=size)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`: `<s>` before each sentence, `<unk>` for words not in the list."""
        return [
            token_id
            for sentence in sentences(text)
            for token_id in (BOS_ID, *(self._ids.get(token, UNK_ID) for token in sentence))
        ]

    def decode(self, token_id: int) -> str:
        """The token of an id; `<unk>` for ids that stand for none (reserved, or without a word)."""
        if not 0 <= token_id < self.size:
            raise InvalidCorpus(f"token id {token_id} is not from 0 to {self.size - 1}")
        if FIRST_WORD_ID <= token_id < FIRST_WORD_ID + len(self.words):
            return self.words[token_id - FIRST_WORD_ID]
        if FIRST_MARK_ID <= token_id < FIRST_MARK_ID + len(MARKS):
            return MARKS[token_id - FIRST_MARK_ID]
        return {PAD_ID: "<pad>", BOS_ID: "<s>"}.get(token_id, UNKNOWN)

    def complete(self, prefix: str, ranked_ids: Iterable[int]) -> Iterator[str]:
        """The words among `ranked_ids` that begin with what was typed, in the given order."""
        begun = prefix.lower()
        for token_id in ranked_ids:
            if FIRST_WORD_ID <= token_id < FIRST_WORD_ID + len(self.words):
                word = self.words[token_id - FIRST_WORD_ID]
                if word.startswith(begun):
                    yield word

    def __len__(self) -> int:
        return self.size

    def to_bytes(self) -> bytes:
        """UTF-8 JSON; the same vocabulary always gives the same bytes."""
        document = {"format": FORMAT, "marks": MARKS, "size": self.size, "words": self.words}
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Vocabulary:
        """Read what `to_bytes` wrote. Raises InvalidCorpus for anything else."""
        if len(data) > MAX_BYTES:
            raise InvalidCorpus(f"a vocabulary of {len(data)} bytes; at most {MAX_BYTES} are read")
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InvalidCorpus("the vocabulary is not JSON") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise InvalidCorpus(f"the vocabulary is not of the format {FORMAT}")
        listed, size = document.get("words"), document.get("size")
        if document.get("marks") != list(MARKS):
            raise InvalidCorpus("the vocabulary must list our marks, in our order")
        if type(size) is not int or not isinstance(listed, list):
            raise InvalidCorpus("the vocabulary must have a size and words")
        if not all(_could_be_a_word(word) for word in listed):
            raise InvalidCorpus(
                "the vocabulary lists something that the tokenizer never yields as one word"
            )
        return cls(words=tuple(listed), size=size)


def _could_be_a_word(word: object) -> bool:
    return isinstance(word, str) and sentences(word) == [[word]]
