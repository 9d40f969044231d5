"""What a graph may do: an allow-list of ONNX operators, checked before ONNX Runtime sees the bytes.

A plan is data; what it can do is what these operators can do: arithmetic on tensors. No control
flow (it could run for ever), no random numbers, no strings, no functions, no custom domain, and no
external data (it would read files). The check reads protobuf's wire format directly, so a device
needs no `onnx` package. Field numbers are those of onnx.proto3, IR version 8.
"""

from __future__ import annotations

from collections.abc import Iterator

from homespun.errors import UnsupportedPlan
from homespun.plan.manifest import Runtime

ALLOWED = frozenset(
    """
    Abs Add And ArgMax ArgMin AveragePool Cast Ceil Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos CumSum Div Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements
    GatherND Gemm GlobalAveragePool Greater GreaterOrEqual HardSigmoid HardSwish Identity
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    MatMul Max MaxPool Mean Min Mod Mul Neg Not OneHot Or PRelu Pad Pow Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
    Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size Slice
    Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum Tan Tanh Tile TopK Transpose Trilu
    Unsqueeze Where Xor """.split()
)
DOMAINS = frozenset({"", "ai.onnx"})

_Field = tuple[int, int | bytes]


def check_graph(name: str, model: bytes, runtime: Runtime) -> None:
    """Raises UnsupportedPlan, naming graph and operator, unless everything in it is allowed."""
    try:
        _check_model(name, model, runtime)
    except (IndexError, ValueError) as error:
        raise UnsupportedPlan(
            f"graph {name} is not an ONNX model: {error}", hint="build the plan again"
        ) from error


def operators(model: bytes) -> frozenset[str]:
    """The operator types that a graph uses."""
    graphs = [value for field, value in _fields(model) if field == 7]
    nodes = [value for graph in graphs for field, value in _fields(graph) if field == 1]
    return frozenset(_text(node, 4) for node in nodes)


def _check_model(name: str, model: bytes, runtime: Runtime) -> None:
    for field, value in _fields(model):
        if field == 1 and value != runtime.ir:  # ir_version
            _refuse(name, f"has IR version {value!r}, the manifest says {runtime.ir}")
        elif field == 8:  # opset_import
            domain, version = _text(value, 1), _number(value, 2)
            if domain not in DOMAINS:
                _refuse(name, f"imports operators of the domain {domain!r}")
            if version != runtime.opset:
                _refuse(name, f"uses opset {version}, the manifest says {runtime.opset}")
        elif field == 7:  # graph
            _check_nodes(name, _bytes(value))
        elif field == 20:  # training_info
            _refuse(name, "has ONNX training information")
        elif field == 25:  # functions
            _refuse(name, f"defines a function ({_text(value, 1)}); functions must be inlined")


def _check_nodes(name: str, graph: bytes) -> None:
    for field, value in _fields(graph):
        if field == 1:  # node
            op, domain = _text(value, 4), _text(value, 7)
            if domain not in DOMAINS:
                _refuse(name, f"uses the custom operator {domain}::{op}")
            if op not in ALLOWED:
                _refuse(name, f"uses the operator {op}, which plans may not use")
            for inner, attribute in _fields(_bytes(value)):
                if inner == 5:
                    _check_attribute(name, op, _bytes(attribute))
        elif field == 5:  # initializer
            _check_tensor(name, _bytes(value))
        elif field == 15:
            _refuse(name, "has sparse constants")


def _check_attribute(name: str, op: str, attribute: bytes) -> None:
    for field, value in _fields(attribute):
        if field in (5, 10):  # t, tensors
            _check_tensor(name, _bytes(value))
        elif field in (6, 11):  # g, graphs
            _refuse(name, f"has a graph inside the operator {op}")
        elif field in (22, 23):
            _refuse(name, f"has a sparse constant in the operator {op}")


def _check_tensor(name: str, tensor: bytes) -> None:
    for field, value in _fields(tensor):
        if field == 13 or (field == 14 and value != 0):  # external_data, data_location
            _refuse(name, f"keeps the constant {_text(tensor, 8)!r} in another file")


def _refuse(name: str, what: str) -> None:
    raise UnsupportedPlan(
        f"graph {name} {what}",
        hint="build the plan with homespun.plan.build, which uses none of this",
    )


# ---- protobuf's wire format: a message is a run of (field number, value) ----


def _fields(message: int | bytes) -> Iterator[_Field]:
    """The fields of one message: varints as int, everything else as bytes."""
    data = _bytes(message)
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + length > len(data):
            raise ValueError(f"a field of {length} bytes at byte {at} is cut short")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return number, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number at byte {at} is too long")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"a message was expected, not the number {value}")
    return value


def _text(message: int | bytes, wanted: int) -> str:
    """The last value of a string field, as protobuf reads repeated singular fields."""
    found = ""
    for field, value in _fields(message):
        if field == wanted:
            found = _bytes(value).decode()
    return found


def _number(message: int | bytes, wanted: int) -> int:
    found = 0
    for field, value in _fields(message):
        if field == wanted and isinstance(value, int):
            found = value
    return found
