"""`homespun.simulate`: one call from a task and its clients' data to a trained model, and what happened on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from homespun.errors import InvalidConfig, InvalidInput
from homespun.learning.asynchronous import fed_buff, is_fed_buff
from homespun.learning.optimizers import server_optimizer
from homespun.plan.package import Plan
from homespun.simulation.arena import Arena
from homespun.simulation.asynchronous import Durations
from homespun.simulation.checkpoints import Checkpoints
from homespun.simulation.clients import Clients
from homespun.simulation.history import RoundRecord
from homespun.simulation.participation import Availability, Integers, Participation
from homespun.simulation.progress import ProgressBar
from homespun.simulation.run import CHECKPOINTS, Callback, Cohort, Ended, Files, Run
from homespun.simulation.stopping import EarlyStopping, Target
from homespun.simulation.task import Task
from homespun.tensors.codec import digest
from homespun.types import Tree

if TYPE_CHECKING:
    from homespun.simulation.ray import Cluster

Seeds = Sequence[int]
SAMPLED_ROWS = 256
"""Of the data, that a resumed run is recognised by."""


@dataclass(frozen=True)
class Result:
    """What a simulation gives. `parameters`: of the model after the last round, name -> array; `history`: one record
    per round; `best_round`: the first with the best evaluation (without any: the best training) loss, or whatever
    early stopping or the target watches; `reason`: why it ended before its last round, empty if it did not.
    """

    parameters: Tree
    history: Sequence[RoundRecord]
    best_round: int | None
    reason: str
    directory: Path | None = None
    _module: nn.Module | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The newest measurements: training's, and those of the newest evaluation as `evaluation.<name>`."""
        if not self.history:
            return {}
        last = self.history[-1]
        evaluation = next((r.evaluation for r in reversed(self.history) if r.evaluation), {})
        return {
            **last.training,
            **{f"evaluation.{name}": value for name, value in evaluation.items()},
        }

    def model(self) -> nn.Module:
        """The task's module with the parameters in it. Raises `InvalidInput` for a plan, which has no module."""
        if self._module is None:
            raise InvalidInput(
                "a plan has no PyTorch module", hint="predict with homespun.plan.run.predict"
            )
        import torch

        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                parameter.copy_(torch.from_numpy(np.array(self.parameters[name])))
        return self._module

    def best_parameters(self) -> Tree:
        """Those after `best_round`. Raises `InvalidInput` for a run that was not kept in a directory."""
        if self.directory is None or self.best_round is None:
            raise InvalidInput(
                "nothing was kept of the best round", hint="give simulate a directory"
            )
        return Checkpoints(self.directory / CHECKPOINTS).load(self.best_round).model


def simulate(
    task: Task | Plan | Callable[[], Task],
    data: Arena,
    *,
    rounds: int,
    cohort: int,
    method: str = "FedAvg",
    method_settings: Mapping[str, Any] | None = None,
    evaluate_on: Arena | None = None,
    evaluate_every: int = 1,
    seed: int = 0,
    initial: Tree | None = None,
    participation: Participation | Cohort | None = None,
    dropout: float = 0.0,
    availability: Availability | None = None,
    durations: Durations | None = None,
    aggregation: Literal["float", "fixed-point", "secure"] = "float",
    clip_norm: float | None = None,
    max_weight: int = 0,
    bits: int = 16,
    rotate: bool = True,
    early_stopping: EarlyStopping | None = None,
    target: Target | None = None,
    directory: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 1,
    keep: int = 2,
    workers: int = 0,
    cluster: Cluster | None = None,
    shards: int | None = None,
    device_seeds: Seeds | None = None,
    strategy: str = "auto",
    chunk: int | None = None,
    train_metrics: bool = False,
    device: str = "cpu",
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Train over simulated clients.

    `task`: a `Task`, a function that makes one (needed with `workers` if it holds what cannot travel), or a `Plan`,
    which is trained exactly as devices do. `data`: one client per entry. Each of `rounds` rounds trains `cohort`
    clients, drawn without replacement from those that have rows and, by `availability`, can take part in that round;
    each of them is lost before it reports with the probability `dropout`. `participation` says more about all of this
    (over-selection, weights, ...), or is a function from the round to its clients.

    `durations`: how long clients take, for the virtual time of the history. With the method `FedBuff` (settings: those
    of `homespun.learning.asynchronous.FedBuff`) nobody waits: `cohort` clients are at work at a time, and a round is a
    step of the server.

    `method`, `method_settings`: of `homespun.learning.method`; for a plan those of a server optimizer. `initial`:
    parameters to begin with, by name; else the module's own. `aggregation`: `float`; `fixed-point`, the integers of a
    deployment; `secure`, these masked and unmasked, too (slow: small cohorts). `clip_norm`: L2 bound of a client's
    update, `max_weight`: examples beyond which a client weighs no more (0: with integers all weigh the same).

    `strategy`: of the engine. All give the same to rounding; `auto` measures once, when the run begins, which is
    fastest, so that two runs may choose differently: name one (`stacked`, say) where these must agree to the last bit.

    `directory`: keeps history and checkpoints there; `resume` goes on from the newest one, to the same bits as without
    a break. `workers`: processes beside this one, which must be able to import the task's functions; with
    `cluster=Cluster(...)` they are actors of Ray, on this machine or many. `shards`: parts of the cohort that they
    share, by default one for each, in a cluster two, whose machines may be unequal. Another number of shards is
    another order of additions: where runs must agree to the last bit whatever their workers, say it.
    `train_metrics`: measure the author's metrics in training, too, not only the loss.
    `callbacks` hear of every round's record.

    Raises `InvalidConfig` for settings that make no sense, `Conflict` for a directory of another run, `NumericFailure`
    naming the round when numbers are not finite any more.
    """
    _check(
        data,
        rounds,
        cohort,
        evaluate_every,
        dropout,
        workers,
        cluster,
        checkpoint_every,
        keep,
        shards,
    )
    settings = dict(method_settings or {})
    if participation is None:
        participation = _uniform(data, cohort, seed, dropout, availability)
    elif dropout or availability is not None:
        raise InvalidConfig(
            "dropout and availability are said twice", hint="say them in participation"
        )
    clients: Cohort = partial(_reporting, participation, data)
    if asynchronous := is_fed_buff(method):
        clients = lambda number: np.zeros(0, np.int64)  # noqa: E731 - the clock knows who takes part
    with ExitStack() as stack:
        module: nn.Module | None = None
        made: Any
        if isinstance(task, Plan):
            examples, work = np.minimum(data.num_rows, task.manifest.max_rows), task.hash
            _refuse_for_plans(workers, aggregation, clip_norm, asynchronous)
            made = _plan_rounds(
                task,
                data,
                evaluate_on,
                method,
                settings,
                cohort,
                seed,
                bits,
                rotate,
                aggregation,
                device_seeds,
            )
        else:
            from homespun.simulation.assembly import async_rounds, cohort_rounds

            buffer = fed_buff({"max_weight": max_weight, **settings}) if asynchronous else None
            made, here = cohort_rounds(
                stack,
                task,
                data,
                evaluate_on,
                method=buffer.method if buffer else method,
                settings=dict(buffer.settings) if buffer else settings,
                seed=seed,
                aggregation=aggregation,
                clip_norm=clip_norm,
                max_weight=max_weight,
                bits=bits,
                rotate=rotate,
                cohort=cohort,
                workers=workers,
                shards=shards,
                strategy=strategy,
                chunk=chunk,
                train_metrics=train_metrics,
                device=device,
                cluster=cluster,
            )
            module, examples = here.model, here.num_examples(data.num_rows)
            if buffer:
                made = async_rounds(
                    made,
                    here,
                    buffer,
                    draw=participation,
                    durations=durations or Durations(),
                    examples=examples,
                    concurrency=cohort,
                )
            work = f"{here.optimizer}, batches of {here.batch_size}, {here.local_epochs} epochs of {here.max_rows} rows"
        files = None
        if directory is not None:
            identity = {
                "method": f"{method} {sorted(settings.items())}",
                "data": _digest(data),
                "seed": str(seed),
                "cohort": str(cohort),
                "dropout": str(dropout),
                "durations": _brief(durations),
                "aggregation": f"{aggregation}, clip_norm {clip_norm}, max_weight {max_weight}",
                "shards": str(shards),
                "strategy": f"{strategy}, chunk {chunk}",
                "task": work,
                "participation": _brief(participation),
            }
            files = Files(
                directory=Path(directory),
                identity=identity,
                resume=resume,
                every=checkpoint_every,
                keep=keep,
            )
        elif resume:
            raise InvalidConfig("nothing to resume without a directory")
        lasts = None
        if durations is not None and not asynchronous:
            durations.check(data.num_clients)
            lasts = partial(_lasts, durations, examples, seed)
        heard = list(callbacks)
        if progress:
            heard.append(stack.enter_context(ProgressBar(rounds)))
        run: Run[Any] = Run(
            rounds=made,
            num_rounds=rounds,
            cohort=clients,
            evaluated=evaluate_on is not None,
            evaluate_every=evaluate_every,
            early_stopping=early_stopping,
            target=target,
            files=files,
            callbacks=heard,
            lasts=lasts,
        )
        ended: Ended[Any] = run.go(initial)
        return Result(
            parameters=made.parameters(ended.state),
            history=tuple(ended.history),
            best_round=ended.best_round,
            reason=ended.reason,
            directory=files.directory if files else None,
            _module=module,
        )


def _plan_rounds(
    plan: Plan,
    data: Arena,
    evaluate_on: Arena | None,
    method: str,
    settings: dict[str, Any],
    cohort: int,
    seed: int,
    bits: int,
    rotate: bool,
    aggregation: str,
    device_seeds: Seeds | None,
) -> Any:
    from homespun.simulation.plans import PlanRounds

    return PlanRounds(
        plan=plan,
        arena=data,
        optimizer=server_optimizer(method, settings),
        max_group=max(cohort, 3),
        seed=seed,
        bits=bits,
        rotate=rotate,
        secure=aggregation == "secure",
        device_seeds=device_seeds,
        evaluate_on=evaluate_on,
    )


def _refuse_for_plans(
    workers: int, aggregation: str, clip_norm: float | None, asynchronous: bool
) -> None:
    if asynchronous:
        raise InvalidConfig(
            "a plan is not simulated asynchronously", hint="simulate the task it was built from"
        )
    if workers:
        raise InvalidConfig("a plan is simulated in this process", hint="workers = 0", got=workers)
    if clip_norm is not None:
        raise InvalidConfig(
            "a plan has its own clip_norm", hint="change it with plan.with_settings(clip_norm=...)"
        )
    if aggregation == "float":
        raise InvalidConfig(
            "a plan's updates are added as on a server, in integers",
            hint='aggregation = "fixed-point" or "secure"',
            got=aggregation,
        )


def _uniform(
    data: Arena, cohort: int, seed: int, dropout: float, availability: Availability | None
) -> Participation:
    """Clients that have rows, all with the same probability."""
    has_rows = data.num_rows > 0
    return Participation(
        num_clients=data.num_clients,
        seed=seed,
        cohort_size=cohort,
        weights=None if has_rows.all() else has_rows.astype(np.float64),
        availability=availability,
        drop_out=dropout,
    )


def _reporting(draw: Participation | Cohort, data: Arena, number: int) -> Clients:
    """Who reports in a round: drawn, with rows, and not lost. If all are lost, the first one is not."""
    if isinstance(draw, Participation):
        drawn = draw.cohort(number)
        clients = drawn.reporting if len(drawn.reporting) else drawn.clients[:1]
    else:
        clients = np.asarray(draw(number), np.int64)
    clients = np.sort(clients[data.offsets[clients + 1] > data.offsets[clients]])
    if not len(clients):
        raise InvalidInput(
            f"round {number} has no client with rows",
            hint="nobody may be available then: look at availability and participation",
        )
    return clients


def _lasts(
    durations: Durations, examples: Integers, seed: int, number: int, clients: Clients
) -> float:
    """A round lasts as long as its slowest client."""
    return float(durations.of(clients, examples[clients], seed, number).max())


def _check(
    data: Arena,
    rounds: int,
    cohort: int,
    evaluate_every: int,
    dropout: float,
    workers: int,
    cluster: Cluster | None,
    checkpoint_every: int,
    keep: int,
    shards: int | None,
) -> None:
    for name, value, least in (
        ("rounds", rounds, 1),
        ("cohort", cohort, 1),
        ("evaluate_every", evaluate_every, 1),
        ("checkpoint_every", checkpoint_every, 1),
        ("keep", keep, 1),
        ("workers", workers, 0),
    ):
        if value < least:
            raise InvalidConfig(f"{name} must be at least {least}", got=value)
    if cluster is not None and not workers:
        raise InvalidConfig("a cluster needs workers", hint="say how many: workers=8")
    if shards is not None and shards < 1:
        raise InvalidConfig("shards must be at least 1", got=shards)
    if not 0 <= dropout < 1:
        raise InvalidConfig("dropout is a probability below 1", got=dropout)
    usable = int((data.num_rows > 0).sum())
    if cohort > usable:
        raise InvalidConfig(
            "the cohort is larger than the clients that have rows",
            expected=f"<= {usable}",
            got=cohort,
        )


def _digest(data: Arena) -> str:
    """Of the data's outline and some of the rows; all may be too many to read."""
    outline = {n: (str(a.dtype), a.shape) for n, a in sorted(data.inputs.items())}
    inside = hashlib.sha256(np.ascontiguousarray(data.offsets).tobytes())
    some = np.unique(
        np.linspace(0, max(int(data.offsets[-1]) - 1, 0), SAMPLED_ROWS).astype(np.int64)
    )
    for _, array in sorted(data.inputs.items()):
        inside.update(np.ascontiguousarray(array[some[: len(array)]]).tobytes())
    return digest(f"{outline}{inside.hexdigest()}".encode())[:16]


def _brief(setting: object) -> str:
    """A setting as part of an identity, in words if they are few; functions cannot be told apart."""
    words = "a function" if callable(setting) else repr(setting)
    return words if len(words) <= 200 else digest(words.encode())[:16]
