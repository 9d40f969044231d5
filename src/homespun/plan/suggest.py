"""Next-word suggestions from a plan with a text feature: works offline, with nothing but the plan's
files and a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from homespun.corpora.tokenizer import SENTENCE_ENDS
from homespun.errors import InvalidExample, NumericFailure, PlanError, UnsupportedPlan
from homespun.plan.engine import Predictor
from homespun.plan.features import vocabulary
from homespun.plan.manifest import TextFeature
from homespun.plan.package import Plan
from homespun.types import FloatArray, Tree


@dataclass(frozen=True)
class Suggestion:
    """A word and its probability among all words of the vocabulary."""

    word: str
    probability: float


class Suggester:
    """One plan at one checkpoint, loaded once. Raises UnsupportedPlan if the plan is not for text."""

    def __init__(self, plan: Plan, checkpoint: Tree) -> None:
        plan.manifest.check_checkpoint(checkpoint)
        texts = [f for f in plan.manifest.features if isinstance(f, TextFeature)]
        if not texts:
            raise UnsupportedPlan(
                f"plan {plan.manifest.name} does not read text, so it cannot suggest words",
                hint="use homespun.plan.run.predict",
            )
        self._feature = texts[0]
        self._words = vocabulary(plan.assets, self._feature)
        self._predictor = Predictor(plan.graphs["predict"], checkpoint)

    def suggest(self, text: str, k: int = 3, prefix: str = "") -> list[Suggestion]:
        """The `k` likeliest next words after `text`, or those that begin with what is typed of the next
        word (`prefix`). Raises NumericFailure if the model gives numbers that are not finite, PlanError if it fails."""
        scores = self._scores(text)
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        begun = prefix.lower()
        found = (
            Suggestion(self._words.words[index], float(probabilities[index]))
            for index in np.argsort(-scores, kind="stable")
            if self._words.words[index].startswith(begun)
        )
        return list(islice(found, k))

    def _scores(self, text: str) -> FloatArray:
        """Logits of the words that exist: float32 [num_words]."""
        ids = self._words.encode(text)
        if not ids or self._words.decode(ids[-1]) in SENTENCE_ENDS:
            ids = [*ids, self._words.bos_id]
        recent = ids[-self._feature.length :]
        tokens = np.full((1, self._feature.length), self._words.pad_id, np.int32)
        tokens[0, : len(recent)] = recent
        try:
            outputs = self._predictor.predict({self._feature.input: tokens})
        except InvalidExample as error:  # all that the model is given is its own vocabulary
            raise PlanError(
                "the model fails on a word that it should know",
                hint="go back to the previous model",
            ) from error
        first = self._words.first_word_id
        scores: FloatArray = next(iter(outputs.values()))[0, first : first + len(self._words.words)]
        if not np.isfinite(scores).all():
            raise NumericFailure(
                "the model's scores are not finite", hint="go back to the previous model"
            )
        return scores
