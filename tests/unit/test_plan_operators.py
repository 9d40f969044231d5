"""Graphs do arithmetic on tensors and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from homespun import zoo
from homespun.errors import UnsupportedPlan
from homespun.plan.manifest import GRAPHS, Runtime
from homespun.plan.operators import ALLOWED, check_graph, operators

RUNTIME = Runtime()


def model(*nodes, constants=(), opsets=None, functions=(), ir=8) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    graph = helper.make_graph(list(nodes), "g", [x], [y], list(constants))
    opsets = opsets or [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=ir)


def refused(proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(UnsupportedPlan, match=message):
        check_graph("train", proto.SerializeToString(), RUNTIME)


def test_the_shipped_graphs_are_allowed():
    for name in zoo.NAMES:
        plan = zoo.load(name)
        for graph in GRAPHS:
            check_graph(graph, plan.graphs[graph], plan.manifest.runtime)
            assert operators(plan.graphs[graph]) <= ALLOWED


def test_operators_are_read_as_onnx_reads_them():
    data = zoo.load("keyboard").graphs["train"]
    nodes = onnx.load_from_string(data).graph.node
    assert operators(data) == {node.op_type for node in nodes}


def test_plain_arithmetic_is_allowed():
    check_graph(
        "train", model(helper.make_node("Add", ["x", "x"], ["y"])).SerializeToString(), RUNTIME
    )


@pytest.mark.parametrize("operator", ["Loop", "RandomNormal", "StringNormalizer", "Unheard"])
def test_operators_that_are_not_on_the_list(operator):
    refused(model(helper.make_node(operator, ["x"], ["y"])), f"operator {operator}")


def test_custom_domains():
    custom = helper.make_node("Add", ["x", "x"], ["y"], domain="com.example")
    refused(model(custom), "custom operator com.example::Add")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    refused(model(helper.make_node("Neg", ["x"], ["y"]), opsets=opsets), r"domain 'ai\.onnx\.ml'")


def test_graphs_inside_operators_and_functions():
    inner = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "inner", [], [])
    refused(model(helper.make_node("Neg", ["x"], ["y"], then_branch=inner)), "graph inside")
    function = helper.make_function(
        "",
        "F",
        ["a"],
        ["b"],
        [helper.make_node("Neg", ["a"], ["b"])],
        [helper.make_opsetid("", 18)],
    )
    refused(model(helper.make_node("Neg", ["x"], ["y"]), functions=[function]), "function")


def test_constants_in_other_files():
    outside = numpy_helper.from_array(np.zeros(2, np.float32), "c")
    onnx.external_data_helper.set_external_data(outside, "secrets.bin")
    add = helper.make_node("Add", ["x", "c"], ["y"])
    refused(model(add, constants=[outside]), "another file")
    constant = helper.make_node("Constant", [], ["c"], value=outside)
    refused(model(constant, add), "another file")


def test_versions_are_those_of_the_manifest():
    neg = helper.make_node("Neg", ["x"], ["y"])
    refused(model(neg, opsets=[helper.make_opsetid("", 21)]), "opset 21")
    refused(model(neg, ir=10), "IR version 10")


@pytest.mark.parametrize("data", [b"\xff" * 20, b"not a model", b"\x3a\xff\xff\x03ab", b"\x38\x01"])
def test_bytes_that_are_no_model(data):
    with pytest.raises(UnsupportedPlan):
        check_graph("train", data, RUNTIME)
