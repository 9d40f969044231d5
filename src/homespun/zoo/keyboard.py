"""The keyboard's plan: what the next-word model is trained for and how it is judged.

Token ids are those of `homespun.corpora.vocabulary`. Every position predicts the next token. Padding,
unknown words and sentence starts are no targets of the loss. The metrics ask what a keyboard asks: of all
*words*, is the next one among the first k? Unknown words count as wrong, punctuation is not asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from homespun.corpora.vocabulary import BOS_ID, FIRST_WORD_ID, PAD_ID, UNK_ID
from homespun.plan.build import build_plan, cross_entropy, in_top
from homespun.plan.build.steps import Batch
from homespun.plan.manifest import ClientOptimizer, Constant, Normal, TextFeature, Uniform, Zipf
from homespun.plan.package import Plan
from homespun.zoo.models import DEMO, KeyboardSize, NextWord


def loss(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy [B, T] and its mask: targets that say something about language."""
    target = batch["y"]
    told = (target != PAD_ID) & (target != UNK_ID) & (target != BOS_ID)
    return cross_entropy(logits, target), told


def top(k: int, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Is the next word among the first `k` words: [B, T] and the mask of positions where one comes."""
    target = batch["y"]
    known = target >= FIRST_WORD_ID
    index = (target - FIRST_WORD_ID).clamp(min=0)
    hit = in_top(logits[..., FIRST_WORD_ID:], index, k) * known
    return hit, known | (target == UNK_ID)


def build(size: KeyboardSize = DEMO, name: str = "keyboard") -> Plan:
    """The keyboard's plan, without its vocabulary (an asset added when a task is published)."""
    torch.manual_seed(0)
    recurrent = Uniform(bound=1 / math.sqrt(size.hidden))
    return build_plan(
        NextWord(size),
        name=name,
        examples=_examples(size),
        loss=loss,
        metrics={
            "top1": lambda logits, batch: top(1, logits, batch),
            "top3": lambda logits, batch: top(3, logits, batch),
        },
        features=[TextFeature(field="text", length=size.length, vocabulary_size=size.vocabulary)],
        optimizer=ClientOptimizer(learning_rate=3.0, max_grad_norm=1.0),
        batch_size=16,
        max_rows=400,
        min_examples=10,
        clip_norm=15.0,
        max_weight=400,
        initial={
            "embedding.weight": Normal(std=0.2),
            "input": recurrent,
            "recurrent": recurrent,
            "projection": recurrent,
            "direct": Uniform(bound=1 / math.sqrt(size.embedding)),
            "gates": Constant(),
            "bias": Zipf(first=FIRST_WORD_ID),
        },
    )


def _examples(size: KeyboardSize) -> dict[str, Tensor]:
    """Random tokens of every kind, with padded tails."""
    generator = torch.Generator().manual_seed(0)
    shape = (64, size.length + 1)
    tokens = torch.randint(PAD_ID + 1, size.vocabulary, shape, generator=generator)
    reserved = torch.randint(PAD_ID + 1, FIRST_WORD_ID, shape, generator=generator)
    tokens = torch.where(torch.rand(shape, generator=generator) < 0.3, reserved, tokens)
    lengths = torch.randint(2, size.length + 2, (shape[0], 1), generator=generator)
    tokens = torch.where(torch.arange(shape[1]) < lengths, tokens, PAD_ID).int()
    return {"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()}
