"""Clients whose losses are quadratics, trained by exact gradients: what a method makes of them is known in closed form.

f_i(w) = 1/2 (w - b_i)^T A_i (w - b_i) + floor_i. After K steps of rate r from x, without any rule, client i is at
b_i + (1 - r A_i)^K (x - b_i). Works with NumPy arrays and with PyTorch's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from homespun.learning.method import (
    Layout,
    LocalResult,
    LocalRule,
    Method,
    Report,
    Sums,
    reported,
)

ALL = slice(None)


@dataclass
class Quadratics:
    """`curvature` [m, d, d], `optimum` [m, d], `floor` [m], `num_examples` [m], `num_steps` [m]."""

    curvature: Any
    optimum: Any
    num_examples: Any
    num_steps: Any
    floor: Any
    learning_rate: float = 0.1
    momentum: float = 0.0

    def gradient(self, w, who=ALL):
        """[m, d] at w [m, d] or [d]."""
        return (self.curvature[who] @ (w - self.optimum[who])[..., None])[..., 0]

    def loss(self, w, who=ALL):
        """[m] at w [m, d] or [d]."""
        away = w - self.optimum[who]
        return (away * self.gradient(w, who)).sum(-1) / 2 + self.floor[who]

    def train(self, model, rule: LocalRule, who) -> LocalResult:
        losses = choice = None
        start = model if rule.start is None else rule.start
        if rule.candidates is not None:
            losses = self.optimum[who][:, : len(rule.candidates)] * 0
            for j, candidate in enumerate(rule.candidates):
                losses[:, j] = self.loss(candidate, who)
            choice = losses.argmin(1)
            start = rule.candidates[choice]
        start = self.optimum[who] * 0 + start
        anchor = model if rule.anchor is None else rule.anchor
        correction = 0 if rule.correction is None else rule.correction
        w, velocity, steps = start, start * 0, self.num_steps[who]
        for step in range(int(steps.max())):
            g = rule.scale * self.gradient(w, who) + rule.proximal * (w - anchor) + correction
            velocity = self.momentum * velocity + g
            w = w - (steps > step)[:, None] * (self.learning_rate * velocity)
        return LocalResult(
            update=w - start,
            num_examples=self.num_examples[who],
            num_steps=steps,
            learning_rate=self.learning_rate,
            losses=losses,
            choice=choice,
            gradient=self.gradient(start, who) if rule.wants_gradient else None,
        )

    def minimiser(self, weights=None):
        """[d]: of sum weights_i f_i."""
        return rest(self.curvature, self.optimum, weights)


def rest(pulls, targets, weights=None):
    """[d]: where sum weights_i pulls_i (w - targets_i) = 0; pulls [m, d, d], targets [m, d]."""
    weights = np.ones(len(pulls)) if weights is None else weights
    pulls = pulls * np.asarray(weights)[:, None, None]
    return np.linalg.solve(pulls.sum(0), (pulls @ targets[..., None])[..., 0].sum(0))


def quadratics(m=4, d=3, seed=0, steps=5, **changes) -> Quadratics:
    """Clients that disagree in everything; eigenvalues of the A_i in [0.3, 3]."""
    rng = np.random.default_rng(seed)
    turns = np.linalg.qr(rng.normal(size=(m, d, d)))[0]
    values = rng.uniform(0.3, 3.0, size=(m, d))
    given = {
        "curvature": turns @ (values[..., None] * turns.transpose(0, 2, 1)),
        "optimum": rng.normal(size=(m, d)) * 2,
        "num_examples": rng.integers(1, 9, size=m).astype(float),
        "num_steps": np.full(m, float(steps)),
        "floor": np.full(m, 0.5),
    }
    return Quadratics(**{**given, **changes})


@dataclass
class Simulation:
    """A method at work on quadratics: one round after another."""

    method: Method
    problem: Quadratics
    model: Any
    layout: Layout = field(default_factory=lambda: Layout({}))
    server: Any = None
    clients: Any = None
    population: int = 0
    """0: as many as the problem has clients."""
    sums: Sums | None = None
    """Of the last round."""

    def __post_init__(self) -> None:
        self.server = self.method.begin(self.model, self.layout)
        begin = self.method.client_begin or (lambda model, layout: {})
        self.clients = {
            name: self.problem.optimum[:, :1] * 0 + vector
            for name, vector in begin(self.model, self.layout).items()
        }

    def evaluated(self) -> Any:
        """[m, d]: what the clients predict with."""
        if self.method.evaluated is None:
            return self.problem.optimum * 0 + self.model
        return self.method.evaluated(self.model, self.server, self.clients)

    def report(self, who) -> Report:
        mine = {name: rows[who] for name, rows in self.clients.items()}
        rules = self.method.local(self.model, self.server, mine)
        results = tuple(self.problem.train(self.model, rule, who) for rule in rules)
        return reported(self.method, self.model, self.server, mine, results)

    def round(self, *chunks) -> None:
        """One round of the clients of these chunks, index arrays; none: of all in one chunk."""
        m = len(self.problem.optimum)
        chunks = chunks or (np.arange(m),)
        population = self.population or m
        reports = [self.report(who) for who in chunks]
        for who, report in zip(chunks, reports, strict=True):
            for name, rows in report.kept.items():
                assert rows.shape == self.clients[name][who].shape
                self.clients[name][who] = rows
        vectors = {n: sum(r.vectors[n].sum(0) for r in reports) for n in reports[0].vectors}
        numbers = {n: sum(float(r.numbers[n].sum()) for r in reports) for n in reports[0].numbers}
        n = sum(len(who) for who in chunks)
        if self.method.combine is not None:
            (report,) = reports  # it needs all of them together, and weights are equal
            combined = self.method.combine(report.vectors["update"], report.numbers["weight"])
            vectors, numbers = {"update": combined}, {"weight": 1.0}
        self.sums = Sums(vectors, numbers, n, population)
        self.model, self.server = self.method.server_update(self.model, self.server, self.sums)

    def rounds(self, count: int):
        """The model after so many rounds of all clients."""
        for _ in range(count):
            self.round()
        return self.model
