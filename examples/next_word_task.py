"""Next words by federated learning, on any text that says who wrote it: `next_word.toml`, `shakespeare.toml`.

The text: what `homespun.corpora.read` reads, such as a Parquet or JSON-lines table with the columns user and text.
People are divided, never their text: `test` was never trained on, and is for the last word; `validation` was never
trained on either, and is for curves and decisions. The vocabulary is that of the people who train. (A deployment
takes it from public text: nobody may see which words a person uses.)
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import nn

from homespun import Arena, Task, corpora
from homespun.corpora.sources import UserText
from homespun.corpora.vocabulary import FIRST_WORD_ID, Vocabulary
from homespun.errors import InvalidConfig
from homespun.plan.manifest import ClientOptimizer
from homespun.rng import unit_interval
from homespun.simulation.datasets import from_text
from homespun.zoo import keyboard
from homespun.zoo.models import KeyboardSize, NextWord


def task(
    vocabulary: int = 10_000,
    embedding: int = 96,
    hidden: int = 192,
    learning_rate: float = 2.0,
    batch_size: int = 8,
    max_rows: int = 64,
) -> Task:
    """The zoo's keyboard model in this size, begun as the zoo's plan begins."""
    torch.manual_seed(0)
    model = NextWord(KeyboardSize(vocabulary, embedding, hidden, pairs=True))
    with torch.no_grad():
        model.embedding.weight.normal_(0, 0.2)
        for weight in (model.input, model.recurrent, model.projection):
            weight.uniform_(-1 / math.sqrt(hidden), 1 / math.sqrt(hidden))
        if model.direct is not None:
            model.direct.uniform_(-1 / math.sqrt(embedding), 1 / math.sqrt(embedding))
        zipf(model.bias)
    return Task(
        model=model,
        loss=keyboard.loss,
        metrics={f"top{k}": partial(keyboard.top, k) for k in (1, 3)},
        optimizer=ClientOptimizer(learning_rate=learning_rate, max_grad_norm=1.0),
        batch_size=batch_size,
        max_rows=max_rows,
    )


def zipf(bias: nn.Parameter) -> None:
    """Words stand in order of frequency, and the n-th is about 1/n as frequent as the first."""
    ranks = (torch.arange(len(bias)) - FIRST_WORD_ID).clamp(min=0)
    logits = -torch.log(ranks + 3.7)
    logits[:FIRST_WORD_ID] = logits.min()
    bias.copy_(logits - logits.mean())


def split(
    path: str,
    test: float = 0.2,
    validation: float = 0.01,
    min_rows: int = 8,
    vocabulary: int = 10_000,
    length: int = 20,
    seed: int = 0,
) -> tuple[Arena, Arena, Arena]:
    """Windows of `length` tokens to train on, of `validation` and of `test`: shares of the people, who are on their
    side by their name alone. Who has fewer than `min_rows` windows does not train, as on a device with `min_examples`.
    """
    if not 0 < test < test + validation < 1:
        raise InvalidConfig("test and validation are shares of the people", got=(test, validation))
    training: list[UserText] = []
    sides: tuple[list[UserText], ...] = ([], [], training)
    for user in corpora.read(path):
        place = unit_interval(seed, "held out", user.user)
        sides[(place >= test) + (place >= test + validation)].append(user)
    words = Vocabulary.build((text for user in training for text in user.texts), vocabulary)
    tested, validated, trained = (from_text(users, words, length) for users in sides)
    return trained.subset(np.flatnonzero(trained.num_rows >= min_rows)), validated, tested


def data(path: str, **settings: float) -> tuple[Arena, Arena]:
    """To train on, and to draw the curve with: see `split`."""
    training, validation, _ = split(path, **settings)  # type: ignore[arg-type]
    return training, validation
