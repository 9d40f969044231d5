"""The next word by counting: what a next-word model has to beat.

The trigram with the bigram and the words' own frequencies behind it, mixed by Witten and Bell's rule (1991): in a
context seen n times before k different words, P(w) = (count(w) + k P'(w)) / (n + k), where P' knows a token less.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from homespun.corpora.vocabulary import FIRST_WORD_ID, PAD_ID, UNK_ID
from homespun.simulation.arena import Arena

RANKS = (1, 3)
Stream = Sequence[int]
Context = tuple[int, ...]


def streams(rows: Arena) -> Iterator[Stream]:
    """Each client's tokens in order: what its windows were cut from."""
    for client in range(rows.num_clients):
        windows = rows.rows(client)
        tokens = np.concatenate([windows["x"][0, :1], windows["y"].reshape(-1)])
        yield tokens[tokens != PAD_ID].tolist()


class Trigram:
    """Counts of words after two tokens, after one, and at all."""

    def __init__(self, read: Iterable[Stream]) -> None:
        self._after: defaultdict[Context, Counter[int]] = defaultdict(Counter)
        for stream in read:
            for place, word in enumerate(stream):
                if word >= FIRST_WORD_ID:
                    for length in range(min(place, 2) + 1):
                        self._after[tuple(stream[place - length : place])][word] += 1
        self._times = {context: words.total() for context, words in self._after.items()}
        self._likeliest: dict[Context, list[int]] = {}

    def probability(self, word: int, context: Context) -> float:
        """Of `word` after `context`, the last tokens, at most two."""
        seen = self._after.get(context, Counter())
        if not context:
            return seen[word] / self._times[context]
        shorter = self.probability(word, context[1:])
        return (
            (seen[word] + len(seen) * shorter) / (self._times[context] + len(seen))
            if seen
            else shorter
        )

    def likeliest(self, context: Context) -> list[int]:
        """The three likeliest words. Those not seen here are ranked as after one token less: so only what was seen here
        and that ranking's first ones come into question."""
        if context not in self._likeliest:
            behind = self.likeliest(context[1:]) if context else []
            possible = {*self._after.get(context, ()), *behind}
            ranked = sorted(possible, key=lambda word: (-self.probability(word, context), word))
            self._likeliest[context] = ranked[: max(RANKS)]
        return self._likeliest[context]


def hits(model: Trigram, read: Iterable[Stream], tokens: int = 2) -> Mapping[str, float]:
    """`top1` and `top3`: shares of all words of `read`, those unknown to the vocabulary counted as wrong, when the
    model sees that many tokens before a word. 0: it always says the commonest words.
    """
    asked, right = 0, dict.fromkeys(RANKS, 0)
    for stream in read:
        for place, word in enumerate(stream):
            if place and (word >= FIRST_WORD_ID or word == UNK_ID):
                asked += 1
                best = model.likeliest(tuple(stream[max(place - tokens, 0) : place]))
                for rank in RANKS:
                    right[rank] += word in best[:rank]
    return {f"top{rank}": right[rank] / asked for rank in RANKS}
