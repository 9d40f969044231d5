"""What is read off a module: layers that cannot be in a plan, and how parameters start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

from homespun.errors import PlanError
from homespun.plan.manifest import Constant, Initializer, Normal, ParameterSpec, Uniform

_REFUSED: tuple[tuple[type[nn.Module], str], ...] = (
    (
        nn.modules.batchnorm._BatchNorm,
        "its statistics mix the examples of a batch; use nn.GroupNorm or nn.LayerNorm",
    ),
    (nn.EmbeddingBag, "use nn.Embedding and .mean(1) or .sum(1)"),
)


def check_modules(model: nn.Module) -> None:
    """Raises PlanError naming the first layer that a plan cannot hold, and what to use instead."""
    for path, module in model.named_modules():
        kind = f"layer {path or '(the model)'}: {type(module).__name__}"
        for refused, instead in _REFUSED:
            if isinstance(module, refused):
                raise PlanError(f"{kind} cannot be in a plan", hint=instead, layer=path)
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p and module.training:
            raise PlanError(
                f"{kind} draws random numbers, which a plan cannot",
                hint="take it out or set p=0: a device trains a few steps and need not regularise",
                layer=path,
            )
        mode = str(getattr(module, "mode", ""))
        if isinstance(module, nn.Upsample) and mode != "nearest":
            raise PlanError(
                f"{kind} with mode {mode!r} cannot be in a plan",
                hint="use mode='nearest' with a whole factor, or a ConvTranspose2d",
                layer=path,
            )


def parameter_specs(
    model: nn.Module, initial: Mapping[str, Initializer]
) -> tuple[ParameterSpec, ...]:
    """Specs of all parameters in the module's order.

    `initial` maps names or patterns (`"rnn.*"`) to initializers; what it does not name starts as PyTorch
    starts the layer. Raises PlanError for a parameter that is neither named nor of a known layer.
    """
    specs = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            given = [value for pattern, value in initial.items() if fnmatchcase(full, pattern)]
            start = given[0] if given else _default(module, name, parameter)
            if start is None:
                raise PlanError(
                    f"it is not known how parameter {full} of {type(module).__name__} starts",
                    hint=f"say so: initial={{{full!r}: Uniform(bound=0.1)}}",
                )
            specs.append((full, tuple(parameter.shape), start))
    order = [name for name, _ in model.named_parameters()]
    found = {
        name: ParameterSpec(name=name, shape=shape, initial=start) for name, shape, start in specs
    }
    return tuple(found[name] for name in order)


def _default(module: nn.Module, name: str, parameter: Tensor) -> Initializer | None:
    """As `reset_parameters` of the layer; a tensor with one value everywhere starts with that value."""
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return Uniform(bound=1 / math.sqrt(module.weight[0].numel()))
    if isinstance(module, nn.Embedding):
        return Normal(std=1.0)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return Uniform(bound=1 / math.sqrt(module.hidden_size))
    first = parameter.detach().reshape(-1)[0]
    return Constant(value=float(first)) if bool((parameter == first).all()) else None
