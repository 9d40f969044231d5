"""What the demo is made of: people's text, a vocabulary from public text, a plan, and a baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from homespun import corpora, zoo
from homespun.cli.demo.devices import DemoDevice
from homespun.corpora.sources import UserText
from homespun.corpora.tokenizer import words
from homespun.corpora.vocabulary import Vocabulary
from homespun.errors import InvalidCorpus
from homespun.plan.manifest import Manifest, TextFeature
from homespun.plan.package import Plan
from homespun.rng import stream
from homespun.types import FloatArray, Tree

MIN_WORDS = 200


@dataclass(frozen=True)
class People:
    """The users whose text is spread over the devices, and where it came from."""

    users: tuple[UserText, ...]
    origin: str

    @property
    def num_words(self) -> int:
        return sum(num_words(user) for user in self.users)


def num_words(user: UserText) -> int:
    """Words of all texts of one user."""
    return sum(len(words(text)) for text in user.texts)


def gather(path: Path | None, count: int) -> People:
    """The `count` users who wrote most; the Python's smaller modules are dealt out to the larger ones.

    Raises `InvalidCorpus` when there are fewer.
    """
    if path is None:
        users = corpora.gather(corpora.docstrings(min_words=MIN_WORDS), count)
        return People(users, "the documentation strings of this Python")
    found = corpora.read(path)
    if len(found) < count:
        raise InvalidCorpus(
            f"{path} has {len(found)} users, the demo needs {count}",
            hint="give a text of more people, or ask for fewer --devices",
        )
    most = sorted(found, key=lambda user: (-num_words(user), user.user))[:count]
    return People(tuple(sorted(most, key=lambda user: user.user)), str(path))


def public_texts(path: Path | None) -> Sequence[str]:
    """What the server may read to choose its words: never a device's text."""
    if path is None:
        return corpora.public_text()
    return [text for user in corpora.read(path) for text in user.texts]


def keyboard_plan(public: Sequence[str]) -> Plan:
    """The shipped keyboard plan, with a vocabulary from public text."""
    plan = zoo.load("keyboard")
    (feature,) = (f for f in plan.manifest.features if isinstance(f, TextFeature))
    vocabulary = Vocabulary.build(public, feature.vocabulary_size)
    return plan.with_assets({feature.asset: vocabulary.to_bytes()})


def num_words_known(plan: Plan) -> int:
    """Words that the plan's vocabulary holds."""
    return len(_vocabulary(plan).words)


def unigram_checkpoint(plan: Plan, devices: Sequence[DemoDevice]) -> dict[str, FloatArray]:
    """A checkpoint that always suggests the commonest words of these devices: the baseline to beat.

    All parameters are zero but the output bias. No real server could make it, since it takes the
    devices' text; the demo plays all parts and so has it.
    """
    vocabulary = _vocabulary(plan)
    texts = (text for device in devices for text in device.user.texts)
    counts = np.full(vocabulary.size, 0.1)  # a word that never came up is not impossible
    for token, count in Counter(t for text in texts for t in vocabulary.encode(text)).items():
        counts[token] += count
    zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in plan.manifest.parameters}
    return {**zeros, _output_bias(plan.manifest): np.log(counts).astype(np.float32)}


def word_unknown_to(plan: Plan, devices: Sequence[DemoDevice]) -> str:
    """The commonest word of the plan's vocabulary that nobody has written on these devices."""
    written = {word for device in devices for text in device.user.texts for word in words(text)}
    return next(w for w in _vocabulary(plan).words if w.isalpha() and w not in written)


def fragile_checkpoint(plan: Plan, trained: Tree, word: str) -> dict[str, FloatArray]:
    """`trained`, but after `word` the numbers overflow: no test finds that whose text does not have the word.

    Its embedding is as if something had gone wrong in one row; its bias keeps it from ever being suggested.
    """
    vocabulary = _vocabulary(plan)
    token = vocabulary.encode(word)[-1]
    fragile = {name: array.copy() for name, array in trained.items()}
    (embedding,) = (n for n, a in fragile.items() if a.ndim == 2 and a.shape[0] == vocabulary.size)
    fragile[embedding][token] = 3e19
    fragile[_output_bias(plan.manifest)][token] = -1e30
    return fragile


def noisy_checkpoint(trained: Tree, seed: int) -> dict[str, FloatArray]:
    """`trained` with noise on every parameter, as large as the parameters are: a worse model."""
    rng = stream(seed, "noise")
    return {
        name: (array + array.std() * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in sorted(trained.items())
    }


def _vocabulary(plan: Plan) -> Vocabulary:
    (feature,) = (f for f in plan.manifest.features if isinstance(f, TextFeature))
    return Vocabulary.from_bytes(plan.assets[feature.asset])


def _output_bias(manifest: Manifest) -> str:
    (feature,) = (f for f in manifest.features if isinstance(f, TextFeature))
    (name,) = (s.name for s in manifest.parameters if s.shape == (feature.vocabulary_size,))
    return name
