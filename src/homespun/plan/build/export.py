"""From a pure function to canonical ONNX bytes.

1. `make_fx` writes down what PyTorch does, gradients included, as a graph of operators.
2. A second `make_fx` removes in-place operations and replaces operators that ONNX lacks. (In one pass,
   functionalization fails on custom autograd functions; without it, dropping copies gives wrong
   gradients for modules that work in place, such as GRU.)
3. `torch.export` and `torch.onnx.export` translate the graph; no weight is inside, all are arguments.
4. The result is made canonical: values and nodes numbered in order, nothing of the exporter's metadata,
   large uniform constants as ConstantOfShape. The same function gives the same bytes.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import torch
from onnx import helper, inliner, numpy_helper
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.onnx._internal.exporter import _registration

from homespun.errors import PlanError
from homespun.plan.build.decompositions import aten, decompositions, translations
from homespun.plan.build.steps import Graph
from homespun.plan.manifest import Runtime
from homespun.plan.operators import ALLOWED, operators

_LARGE = 256  # elements from which a uniform constant is not stored
_COPIES = (
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
)
_RANDOM = ("native_dropout", "bernoulli", "rand", "randn", "randint", "normal", "multinomial")
_INSTEAD = {
    "embedding_bag": "use nn.Embedding and .mean(1) or .sum(1) instead of EmbeddingBag",
    "bilinear": "use nearest upsampling, or a ConvTranspose2d, instead of bilinear upsampling",
    "bicubic": "use nearest upsampling, or a ConvTranspose2d, instead of bicubic upsampling",
    "batch_norm": "use nn.GroupNorm or nn.LayerNorm instead of BatchNorm",
    "_local_scalar_dense": "use torch.where instead of a Python `if` (or .item()) on tensor values",
    "data-dependent": "use torch.where instead of a Python `if` (or .item()) on tensor values",
    "data dependent": "use torch.where instead of a Python `if` (or .item()) on tensor values",
    "nonzero": "use a mask and torch.where instead of selecting by a boolean tensor",
    "dft": "write the transform as a matrix product",
    "bfloat16": "use float32",
    "fft": "write the transform as a matrix product",
}


def export(graph: Graph, runtime: Runtime) -> bytes:
    """ONNX bytes of one graph. Raises PlanError naming the operator that cannot be exported."""
    # Arguments that are one tensor would be traced as one value: the proximal term p - a would be 0.
    arguments = tuple(tensor.clone() for tensor in graph.arguments.values())
    try:
        with _quietly():
            model = _to_onnx(graph, trace(graph, arguments), arguments, runtime)
    except PlanError:
        raise
    except Exception as error:
        raise _explained(graph.name, error) from error
    data = canonical(model, graph.name, runtime)
    if refused := sorted(operators(data) - ALLOWED):
        raise PlanError(
            f"the {graph.name} graph needs the ONNX operator {refused[0]}, which plans may not use",
            hint=_advice(refused[0]),
            operator=refused[0],
        )
    return data


def trace(graph: Graph, arguments: tuple[Tensor, ...]) -> fx.GraphModule:
    """The function as a graph of operators that ONNX has."""
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        torch.backends.mkldnn.flags(enabled=False),  # nn.LSTM as cells, not as one fused operator
    ):
        written = make_fx(graph.function, tracing_mode="fake", _allow_non_fake_inputs=True)(
            *arguments
        )
        _refuse_random(graph.name, written)
        pure = torch.func.functionalize(written, remove="mutations")
        module: fx.GraphModule = make_fx(
            pure,
            decomposition_table=decompositions(),
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
        )(*arguments)
    _tidy(module)
    return module


def _refuse_random(name: str, module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        operator = str(node.target).split(".")[1:2]
        if node.op == "call_function" and operator and operator[0].rstrip("_") in _RANDOM:
            raise PlanError(
                f"the {name} graph draws random numbers ({node.target})",
                hint="take out dropout and noise: a device trains a few steps and need not regularise",
                operator=str(node.target),
            )


def _tidy(module: fx.GraphModule) -> None:
    """ONNX has neither copies nor strides: drop the ones, make views of the others reshapes."""
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise PlanError(
                f"the operator {node.target} changes its argument and could not be made pure",
                hint="write it without in-place operations",
                operator=str(node.target),
            )
        if node.target in _COPIES:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    module.graph.eliminate_dead_code()
    module.recompile()


def _to_onnx(
    graph: Graph, module: fx.GraphModule, arguments: tuple[Tensor, ...], runtime: Runtime
) -> onnx.ModelProto:
    with torch.no_grad():
        program = torch.export.export(_Flat(module), arguments, strict=False)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        optimize=True,
        verbose=False,
        opset_version=runtime.opset,
        input_names=list(graph.arguments),
        output_names=list(graph.results),
        custom_translation_table=translations(),
    )
    if exported is None:
        raise PlanError(f"the exporter returned nothing for the {graph.name} graph")
    return exported.model_proto


class _Flat(nn.Module):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = self.module(*arguments)
        return results


def canonical(model: onnx.ModelProto, name: str, runtime: Runtime) -> bytes:
    """A new model with the same nodes, numbered in order, and nothing else."""
    if model.functions:
        model = inliner.inline_local_functions(model)
    source = model.graph
    names = {value.name: value.name for value in (*source.input, *source.output)} | {"": ""}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in source.initializer}
    nodes, kept = [], []
    used = [input_ for node in source.node for input_ in node.input]
    used += [value.name for value in source.output]
    for number, constant in enumerate(dict.fromkeys(n for n in used if n in constants)):
        array = constants[constant]
        renamed = names.setdefault(constant, f"c{number}")
        if array.size >= _LARGE and (array == array.flat[0]).all():
            shape = f"{renamed}.shape"
            kept.append(numpy_helper.from_array(np.array(array.shape, np.int64), shape))
            value = numpy_helper.from_array(array.reshape(-1)[:1].copy())
            nodes.append(helper.make_node("ConstantOfShape", [shape], [renamed], value=value))
        else:
            kept.append(numpy_helper.from_array(array, renamed))
    for node in source.node:
        for output in node.output:
            names.setdefault(output, f"v{len(names)}")
        clean = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
        clean.input.extend(names[value] for value in node.input)
        clean.output.extend(names[value] for value in node.output)
        clean.attribute.extend(sorted(node.attribute, key=lambda a: a.name))
        for attribute in clean.attribute:
            attribute.doc_string = ""
        nodes.append(clean)
    for number, node in enumerate(nodes):  # some runtimes insist on unique names
        node.name = f"n{number}"
    result = helper.make_model(
        helper.make_graph(
            nodes, name, [_bare(v) for v in source.input], [_bare(v) for v in source.output], kept
        ),
        ir_version=runtime.ir,
        opset_imports=[helper.make_opsetid("", runtime.opset)],
        producer_name="homespun",
    )
    onnx.checker.check_model(result)
    data: bytes = result.SerializeToString(deterministic=True)
    return data


def _bare(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    tensor = value.type.tensor_type
    shape = [dimension.dim_value for dimension in tensor.shape.dim]
    return helper.make_tensor_value_info(value.name, tensor.elem_type, shape)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The exporter talks about its own internals; what matters arrives as an exception."""
    logger = _registration.logger
    level = logger.level
    logger.setLevel("ERROR")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _explained(name: str, error: BaseException) -> PlanError:
    """The first operator that the chain of exceptions names, and what to use instead of it."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if planned := [e for e in chain if isinstance(e, PlanError)]:
        return planned[0]
    text = "\n".join(str(e) for e in chain)
    operator = re.search(r"aten[.:]+(\w+(?:\.\w+)?)", text)
    what = f"the operator aten.{operator[1]}" if operator else str(chain[-1]).split("\n")[0]
    return PlanError(
        f"the {name} graph cannot be exported: {what}",
        hint=_advice(text),
        operator=operator[0] if operator else None,
    )


def _advice(text: str) -> str:
    known = [advice for word, advice in _INSTEAD.items() if word in text.lower()]
    return known[0] if known else "write that part of the model with other operators"
