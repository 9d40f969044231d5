"""Text of people becomes windows of tokens, as on a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from homespun.corpora.sources import UserText
from homespun.corpora.vocabulary import Vocabulary
from homespun.errors import InvalidInput
from homespun.plan.features import windows
from homespun.plan.manifest import TextFeature
from homespun.simulation.arena import Arena
from homespun.simulation.datasets.arrays import pack


def from_text(
    users: Iterable[UserText | tuple[str, Sequence[str]]], vocabulary: Vocabulary, length: int
) -> Arena:
    """Inputs `x` and `y`, uint16 [num_windows, length]: `y[i, t]` is the token after `x[i, t]`.

    Each user's texts form one stream, see `plan.features.windows`; a user without a window is left out. Windows are
    padded with `vocabulary.pad_id`. Raises `InvalidInput` if nobody has a window, `InvalidExample` for what is no text.
    """
    if length < 1:
        raise InvalidInput("a window must have at least 1 token", got=length)
    feature = TextFeature(field="text", length=length, vocabulary_size=vocabulary.size)
    owners, blocks = [], []
    for entry in users:
        user, texts = (entry.user, entry.texts) if isinstance(entry, UserText) else entry
        if isinstance(texts, str):
            raise InvalidInput(f"user {user!r} has one text", hint="give a list of texts")
        x, y = windows(vocabulary, texts, feature)
        owners.append([user] * len(x))
        # A vocabulary has at most 2^16 ids.
        blocks.append({"x": x.astype(np.uint16), "y": y.astype(np.uint16)})
    return pack(owners, blocks)
