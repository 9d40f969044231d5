"""An algorithm, cut where the network is.

    device   train (the plan) -> clip, weight, quantize        ContributionCodec.encode
    ------------------------------------------------------- only sums cross ----------
    server   add -> decode                                      ContributionCodec.add, .decode
             move the parameters                                ServerOptimizer.apply

`Algorithm` is the frozen record of these pure functions for one task; devices, server and simulation use
the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

from homespun.learning.contribution import Aggregate, Contribution, ContributionCodec
from homespun.learning.optimizers import ServerOptimizer, State
from homespun.tensors import tree as trees
from homespun.tensors.tree import Shapes
from homespun.types import FloatArray, Tree


@dataclass(frozen=True)
class Algorithm:
    """`shapes`: the plan's parameters; `codec`: both ends of a contribution; `optimizer`: the server's step."""

    shapes: Shapes
    codec: ContributionCodec
    optimizer: ServerOptimizer

    def server_update(
        self, parameters: Tree, state: State, *totals: Contribution
    ) -> tuple[dict[str, FloatArray], State, Aggregate]:
        """The sums of a round's groups to the next checkpoint and optimizer state.

        Raises `NumericFailure` when the result is not finite; the caller then keeps what it had.
        """
        aggregate = self.codec.decode(*totals)
        update = trees.unflatten(aggregate.mean_update, self.shapes)
        moved, next_state = self.optimizer.apply(parameters, state, update)
        trees.check_finite(moved)
        trees.check_finite(next_state)
        return trees.as_arrays(moved), trees.as_arrays(next_state), aggregate
