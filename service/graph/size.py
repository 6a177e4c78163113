"""How many nodes a model has once its functions are written out, counted without writing them out.

Forty functions that each call the next one twice are a file of 3 kB and a graph of 2^40 nodes.

Rule 1: functions do not call themselves, be it through others; onnx's checker says so before.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

Name = tuple[str, str, str]
"""Of a function: domain, name, overload."""


def nodes_inlined(model: onnx.ModelProto) -> int:
    functions = {(it.domain, it.name, it.overload): it for it in model.functions}
    sizes: dict[Name, int] = {}

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            called = (node.domain, node.op_type, node.overload)
            if called in functions:
                if called not in sizes:
                    sizes[called] = size(functions[called].node)
                total += sizes[called]
            total += 1
            for attribute in node.attribute:
                total += sum(size(body.node) for body in (attribute.g, *attribute.graphs) if body.node)
        return total

    return size(model.graph.node)
