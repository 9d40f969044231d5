"""The modules of the zoo: ordinary PyTorch, which knows nothing of plans, devices or rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, max_pool2d, pad, relu

from homespun.corpora.vocabulary import PAD_ID


@dataclass(frozen=True)
class KeyboardSize:
    """`pairs`: every step sees the word before too, and a linear path leads from both words past the
    recurrence to the output, so that a few rounds are enough to learn which words follow which.
    """

    vocabulary: int
    embedding: int
    hidden: int
    length: int = 20
    pairs: bool = False


DEMO = KeyboardSize(vocabulary=4_000, embedding=64, hidden=128, pairs=True)
"""About 0.35 million parameters: what `homespun demo` trains."""
HARD_2018 = KeyboardSize(vocabulary=10_000, embedding=96, hidden=670)
"""The 1.4 million parameters of the paper, and nothing beside the paper's layers."""


class NextWord(nn.Module):
    """A CIFG-LSTM with tied embeddings (Hard et al. 2018, arXiv:1811.03604): int64 tokens [B, T] ->
    logits [B, T, vocabulary].

    A coupled input-forget gate saves a quarter of an LSTM's parameters; the recurrent state is projected
    to the embedding's size, so that one table serves as input and as output embedding.
    """

    def __init__(self, size: KeyboardSize) -> None:
        super().__init__()
        embedding, hidden = size.embedding, size.hidden
        width = 2 * embedding if size.pairs else embedding
        self.embedding = nn.Embedding(size.vocabulary, embedding)
        self.input = _uniform(width, 3 * hidden)
        self.recurrent = _uniform(embedding, 3 * hidden)
        self.gates = nn.Parameter(torch.zeros(3 * hidden))
        self.projection = _uniform(hidden, embedding)
        self.direct = _uniform(width, embedding) if size.pairs else None
        self.bias = nn.Parameter(torch.zeros(size.vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        return self._logits(self._outputs(tokens))

    def predict(self, tokens: Tensor) -> Tensor:
        """Logits [B, vocabulary] after the last token that is not padding."""
        outputs = self._outputs(tokens)
        last = (tokens != PAD_ID).sum(1).clamp(min=1) - 1
        index = last[:, None, None].expand(-1, 1, outputs.shape[2])
        return self._logits(outputs.gather(1, index).squeeze(1))

    def _outputs(self, tokens: Tensor) -> Tensor:
        """What the words so far say about the next one: [B, T, embedding]."""
        words = self.embedding(tokens)
        if self.direct is not None:  # nothing comes before the first word
            words = torch.cat((words, pad(words, (0, 0, 1, 0))[:, :-1]), -1)
        states = torch.stack(self._states(words), 1)
        return states if self.direct is None else states + words @ self.direct

    def _states(self, words: Tensor) -> list[Tensor]:
        """The projected state after each token: T tensors [B, embedding]."""
        inputs = words @ self.input + self.gates
        state = inputs.new_zeros(len(words), self.projection.shape[1])
        cell = inputs.new_zeros(len(words), self.projection.shape[0])
        states = []
        for step in inputs.unbind(1):  # slicing in the loop would have a quadratic gradient
            forget, output, candidate = (step + state @ self.recurrent).chunk(3, -1)
            forget = torch.sigmoid(forget)
            cell = forget * cell + (1 - forget) * torch.tanh(candidate)
            state = (torch.sigmoid(output) * torch.tanh(cell)) @ self.projection
            states.append(state)
        return states

    def _logits(self, outputs: Tensor) -> Tensor:
        return linear(outputs, self.embedding.weight, self.bias)


def _uniform(*shape: int) -> nn.Parameter:
    """Every element is set by the plan's initializers; these are for a model used without a plan."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class Digits(nn.Module):
    """float32 images [B, 28, 28] in 0..1 -> logits [B, 10]. 52,180 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 7 * 7, 30)
        self.output = nn.Linear(30, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = max_pool2d(relu(self.first(images.unsqueeze(1))), 2)
        x = max_pool2d(relu(self.second(x)), 2)
        x = relu(self.hidden(x.flatten(1)))
        result: Tensor = self.output(x)
        return result
