"""Each rule fires on what is sick, is silent on what is well, and says where and how much."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

import export.audit
from export.audit import RULES, Finding, audit_module, audit_onnx, audit_state, rendering
from service.errors import Refused
from tests import graphs
from tests.export.healthy import HEALTHY, converted
from tests.graphs import BETA, EPS, GAMMA, MEAN, VAR, batchnorm_model

ROOT = Path(__file__).parents[2]
STEPS = 500
Audited = Callable[[], tuple[Finding, ...]]


# Networks to make sick


def rows(count: int = 64, seed: int = 1) -> Tensor:
    """Four columns, each with a mean and a spread of its own."""
    generator = torch.Generator().manual_seed(seed)
    spread, mean = torch.tensor([1.0, 2.0, 0.5, 30.0]), torch.tensor([0.3, 5.0, -2.0, 100.0])
    return torch.randn(count, 4, generator=generator) * spread + mean


def settle(network: nn.Module, *inputs: Tensor, steps: int = STEPS) -> nn.Module:
    """Give every layer the statistics of these rows, gamma and beta of its own, and the counter of a training."""
    generator = torch.Generator().manual_seed(2)

    def measure(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        var_C, mean_C = torch.var_mean(args[0].transpose(0, 1).flatten(1), 1)
        if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
            norm.running_mean.copy_(mean_C)
            norm.running_var.copy_(var_C)
            norm.num_batches_tracked.fill_(steps)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        norms = [part for part in network.modules() if isinstance(part, _BatchNorm)]
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        for norm in norms:
            if norm.affine:
                norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
        network.eval()(*inputs)
    for hook in hooks:
        hook.remove()
    return network


class Small(nn.Module):
    """A table's network: `standard` over the raw columns, then two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.standard = nn.BatchNorm1d(4)
        self.body = nn.Sequential(OrderedDict(linear=nn.Linear(4, 6), norm=nn.BatchNorm1d(6), act=nn.ReLU()))
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.drop(self.body(self.standard(x)))))

    @property
    def norm(self) -> nn.BatchNorm1d:
        norm = self.body.get_submodule("norm")
        assert isinstance(norm, nn.BatchNorm1d)
        return norm


Change = Callable[[Small], object]


def small(*changes: Change) -> Small:
    network = Small()
    settle(network, rows())
    with torch.no_grad():
        for change in changes:
            change(network)
    return network


def of_small(*changes: Change, inputs: bool = False, **told: Any) -> Audited:
    """The audit of a small network after some changes, with rows or without."""
    return lambda: audit_module(small(*changes), (rows(seed=4),) if inputs else None, **told)


def of_state(*changes: Change, **told: Any) -> Audited:
    return lambda: audit_state(small(*changes).state_dict(), **told)


def of(make: Callable[[], nn.Module], *inputs: Tensor, **told: Any) -> Audited:
    return lambda: audit_module(make(), inputs or None, **told)


def settled(make: Callable[[], nn.Module], *inputs: Tensor) -> Audited:
    """The audit of a network settled on these rows, with them."""
    return lambda: audit_module(settle(make(), *inputs), inputs)


def of_onnx(make: Callable[[], onnx.ModelProto], **told: Any) -> Audited:
    return lambda: audit_onnx(make(), **told)


def setting(**values: Any) -> Change:
    """Set attributes of `body.norm`."""

    def change(network: Small) -> None:
        for name, value in values.items():
            setattr(network.norm, name, value)

    return change


def filled(**values: float) -> Change:
    """Fill vectors of `body.norm`; a key such as `running_var_2` means one channel."""

    def change(network: Small) -> None:
        for key, value in values.items():
            name, channel = re.fullmatch(r"(.*?)(?:_(\d))?", key).groups()  # type: ignore[union-attr]
            vector = network.norm.get_parameter(name) if name in ("weight", "bias") else network.norm.get_buffer(name)
            (vector if channel is None else vector[int(channel)]).fill_(value)

    return change


def counted(**counts: int) -> Change:
    """Set the counter of `standard` or `norm`."""

    def change(network: Small) -> None:
        for name, count in counts.items():
            norm: nn.BatchNorm1d = getattr(network, name)
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.fill_(count)

    return change


def both_counted(count: int) -> Change:
    return counted(standard=count, norm=count)


def in_half(network: Small) -> None:
    network.half()


def frozen(network: Small) -> None:
    network.norm.requires_grad_(False)


def shifted(network: Small) -> None:
    assert network.norm.running_mean is not None
    assert network.norm.running_var is not None
    network.norm.running_mean += 0.75 * network.norm.running_var.sqrt()


def without_statistics() -> nn.Module:
    return settle(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False)), rows())


def reference(*changes: Change) -> Mapping[str, Tensor]:
    return small(*changes).state_dict()


def norm_model(norm: Mapping[str, Any], *, opset: int = 17, **vectors: Any) -> onnx.ModelProto:
    """One BatchNormalization 'norm' with these attributes and vectors."""
    constants = {"gamma": GAMMA, "beta": BETA, "mean": MEAN, "var": VAR} | vectors
    node = helper.make_node("BatchNormalization", ["x", "gamma", "beta", "mean", "var"], ["y"], name="norm", **norm)
    return graphs.model([node], constants, opset=opset)


def chained(*nodes: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    """Nodes from x to h, and a BatchNormalization 'norm' from h to y."""
    norm = helper.make_node(
        "BatchNormalization", ["h", "gamma", "beta", "mean", "var"], ["y"], name="norm", epsilon=EPS
    )
    vectors = {"gamma": GAMMA, "beta": BETA, "mean": MEAN, "var": VAR}
    return graphs.model([*nodes, norm], vectors | constants)


def dropped_before(*, linear: bool) -> onnx.ModelProto:
    nodes = [helper.make_node("Dropout", ["x", "ratio"], ["d" if linear else "h"], name="drop")]
    if linear:
        nodes.append(helper.make_node("MatMul", ["d", "w"], ["h"], name="mix"))
    return chained(*nodes, ratio=np.array(0.4, np.float32), w=np.eye(3, dtype=np.float32))


def sequence_model(*, transposed: bool) -> onnx.ModelProto:
    """MatMul gives [batch, 3, 3] with the features last; with or without a Transpose before the norm."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m" if transposed else "h"], name="mix")]
    if transposed:
        nodes.append(helper.make_node("Transpose", ["m"], ["h"], perm=[0, 2, 1]))
    norm = helper.make_node(
        "BatchNormalization", ["h", "gamma", "beta", "mean", "var"], ["y"], name="norm", epsilon=EPS
    )
    constants = {"gamma": GAMMA, "beta": BETA, "mean": MEAN, "var": VAR, "w": np.ones((5, 3), np.float32)}
    return graphs.model([*nodes, norm], constants, x=(TensorProto.FLOAT, ["batch", 3, 5]), y=["batch", 3, 3])


def in_an_if(**attributes: Any) -> onnx.ModelProto:
    """A BatchNormalization 'deep' in the branch of an If, with the vectors of the graph around it."""
    outputs = ["z", "m", "v"] if attributes.get("training_mode") else ["z"]
    deep = helper.make_node(
        "BatchNormalization", ["x", "gamma", "beta", "mean", "var"], outputs, "deep", epsilon=EPS, **attributes
    )
    plain = helper.make_node("Identity", ["x"], ["w"])
    bodies = [
        helper.make_graph([n], "b", [], [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, ["batch", 3])])
        for n in (deep, plain)
    ]
    node = helper.make_node("If", ["condition"], ["y"], then_branch=bodies[0], else_branch=bodies[1])
    return graphs.model([node], {"condition": np.array(True), "gamma": GAMMA, "beta": BETA, "mean": MEAN, "var": VAR})


def in_a_function(mean: Any) -> onnx.ModelProto:
    """A BatchNormalization inside a function, whose vectors the caller names otherwise."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("custom", 1)]
    body = helper.make_node("BatchNormalization", ["a", "g", "b", "m", "v"], ["c"], name="inner", epsilon=EPS)
    function = helper.make_function("custom", "Norm", ["a", "g", "b", "m", "v"], ["c"], [body], opsets[:1])
    call = helper.make_node("Norm", ["x", "one", "two", "three", "four"], ["y"], domain="custom")
    model = graphs.model([call], {"one": GAMMA, "two": BETA, "three": mean, "four": VAR})
    model.functions.append(function)
    model.opset_import.append(opsets[1])
    return model


def folded_model(rule: str) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="mix")
    node.metadata_props.add(key="pkg.onnxscript.rewriter.rule_name", value=rule)
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'body', 'body.norm', '']")
    return graphs.model([node], {"w": np.eye(3, dtype=np.float32)})


def quantised_model(before: str) -> onnx.ModelProto:
    scale = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.uint8)}
    if before == "Relu":
        return chained(helper.make_node("Relu", ["x"], ["h"]))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["h"]),
    ]
    return chained(*nodes, **scale)


class DropsAlways(nn.Module):
    """Forgets `training=self.training`."""

    def __init__(self, *, knows: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.knows = nn.Linear(4, 5), nn.BatchNorm1d(5), knows

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x))
        dropped = functional.dropout(x, 0.35, training=self.training) if self.knows else functional.dropout(x, 0.35)
        return torch.as_tensor(dropped)


class Branching(nn.Module):
    """The anti-fix of 'Expected more than 1 value per channel'."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self._normalised(self.linear(x))

    def _normalised(self, x: Tensor) -> Tensor:
        batch_size, _ = x.shape
        if batch_size != 1:
            x = self.norm(x)
        return x


class WithSpare(nn.Module):
    """A head that eval mode never calls, as new as it was made."""

    def __init__(self, *, spare: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        if spare:
            self.spare = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norm(x)
        return answer


class BranchingInVain(nn.Module):
    """Looks at the number of rows, and answers each row the same all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norm(x) if len(x) > 1 else self.norm(x + 0)
        return answer


class BranchingByLength(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.as_tensor(self.norm(y) if len(x) > 1 else y)


class BranchingBySize(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if x.size(0) == 1 and self.norm is not None:
            return torch.as_tensor(y)
        return torch.as_tensor(self.norm(y))


class Checking(Branching):
    """Looks at numbers of rows, and decides nothing by them."""

    def forward(self, x: Tensor, parts: list[Tensor] | None = None) -> Tensor:
        if x.shape[0] < 1:
            raise ValueError("no rows")
        if x.shape[1] == 4 and (parts is None or len(parts) == 0):
            x = self.linear(x)
        if self.linear.weight.shape[0] == 5:
            y = x[: len(x)]
            x = y if x.shape[0] == y.shape[0] else x
        return torch.as_tensor(self.norm(x))


class Squeezing(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.norm(self.linear(x))).squeeze()


class Centring(Branching):
    """Mixes rows without any BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.as_tensor(self.norm(self.linear(x)))
        return y - 0.1 * y.mean(0)


class BatchStatistics(Branching):
    """A function in training mode, whatever the module's mode is."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.as_tensor(functional.batch_norm(y, None, None, training=True) + self.norm(y))


class FrozenBatchNorm2d(nn.Module):
    """As in detection code: only buffers, and no gradient."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.5), ("running_mean", 0.25), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.get_buffer("weight") * (self.running_var + self.eps).rsqrt()
        shift = self.get_buffer("bias") - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Sequence(nn.Module):
    """Embeddings, a layer whose features come last, and BatchNorm1d; rightly only after a transposition."""

    def __init__(self, *, transposed: bool, recurrent: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.mix: nn.Module = nn.LSTM(4, 6, batch_first=True) if recurrent else nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6 if transposed else 7)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.embedding(x))
        y = functional.gelu(mixed[0] if isinstance(mixed, tuple) else mixed)
        return torch.as_tensor(self.norm(y.transpose(1, 2)).transpose(1, 2) if self.transposed else self.norm(y))


def tokens(*, padded: bool) -> Tensor:
    """[16, 7] of indices; padded: the rows are 3 to 7 long, and then 0."""
    drawn = torch.randint(1, 9, (16, 7), generator=torch.Generator().manual_seed(3))
    lengths = 3 + torch.arange(16) % 5
    return drawn * (torch.arange(7) < lengths[:, None]) if padded else drawn


def series(*, padded: bool) -> Tensor:
    """[16, 4, 9] of numbers; padded: from some position on all channels are 0."""
    x = torch.randn(16, 4, 9, generator=torch.Generator().manual_seed(3)) + 2
    lengths = 4 + torch.arange(16) % 6
    return x * (torch.arange(9) < lengths[:, None])[:, None] if padded else x


def convolution(*after: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 5, 3, padding=1, bias=False), *after, nn.BatchNorm1d(5))


def sequential(*parts: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(nn.Sequential(*parts)).eval()


def qat(*, freezes: bool) -> nn.Module:
    """What quantisation-aware training puts in the place of a convolution and its BatchNorm."""
    from torch.ao.nn.intrinsic.qat import ConvBn2d
    from torch.ao.quantization import get_default_qat_qconfig

    qconfig = get_default_qat_qconfig("fbgemm")  # type: ignore[no-untyped-call]
    layer = ConvBn2d(3, 5, 3, freeze_bn=freezes, qconfig=qconfig)  # type: ignore[no-untyped-call]
    layer.bn.get_buffer("running_mean").fill_(0.5)
    return nn.Sequential(layer).eval()


def averaged() -> nn.Module:
    return AveragedModel(small()).eval()


def wrapped_state(prefix: str, **more: Tensor) -> Mapping[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in small().state_dict().items()} | more


def columns(order: list[int], scale: float = 1.0, only: int | None = None) -> Tensor:
    x = rows(seed=4)[:, order]
    if only is None:
        return x * scale
    x[:, only] *= scale
    return x


def unlike(inputs: Tensor) -> Audited:
    return lambda: audit_module(small(), (inputs,))


def standard_rows() -> Tensor:
    x = rows(seed=4)
    return (x - x.mean(0)) / x.std(0)


# The table: what is sick, what it must say, and its healthy twin


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A network that is sick in one way, and the same network without it."""

    rule: str
    label: str
    sick: Audited
    well: Audited
    says: tuple[str, ...]
    """Parts of the sentence: the layer, and the figures."""
    severity: str


def case(rule: int, label: str, severity: str, sick: Audited, well: Audited, *says: str) -> Case:
    return Case(rule=f"BN{rule:03}", label=label, sick=sick, well=well, says=says, severity=severity)


CASES = (
    case(1, "all of it", "error", of_small(lambda n: n.train()), of_small(), "the network itself", "3 modules",
         "'standard'"),
    case(1, "one layer", "error", of_small(lambda n: n.norm.train()),
         of_small(lambda n: n.body.get_submodule("act").train()),
         "1 module", "'body.norm' (BatchNorm1d)"),
    *(case(1, f"opset {opset}", "error", of_onnx(partial(batchnorm_model, opset=opset, training=True,
         extra_outputs=extra)),
           of_onnx(partial(batchnorm_model, opset=opset)), "layer 'norm'")
      for opset, extra in ((6, ()), (9, ("m", "v", "sm", "sv")), (14, ()), (17, ()))),
    case(1, "in an If", "error", of_onnx(partial(in_an_if, training_mode=1)), of_onnx(in_an_if), "layer 'deep'"),
    case(2, "never had any", "error", of(without_statistics), of_small(), "layer '1'",
         "no running_mean and no running_var"),
    case(2, "switched off later", "warning", of_small(setting(track_running_stats=False)), of_small(), "'body.norm'"),
    case(2, "computed by the graph", "error", of_onnx(graphs.batch_statistics_model), of_onnx(batchnorm_model),
         "layer 'norm'", "computes it from the batch"),
    case(2, "fewer than the reference", "warning",
         lambda: audit_state({"body.norm.running_mean": torch.ones(6), "body.norm.running_var": torch.ones(6) * 2},
                             reference=reference()),
         of_state(reference=reference()), "2 layers", "1 of them", "'standard'"),
    case(3, "new", "error", of(lambda: Small().eval()), of_small(), "2 of 2 layers", "'standard'",
         "num_batches_tracked 0"),
    case(3, "never called", "info", settled(WithSpare, rows()),
         settled(partial(WithSpare, spare=False), rows()), "layer 'spare'", "never called on these rows"),
    case(3, "one layer of a state", "error", of_state(filled(running_mean=0, running_var=1)), of_state(both_counted(0)),
         "layer 'body.norm'", "is 500"),
    case(3, "ONNX", "error", of_onnx(partial(batchnorm_model, mean=np.zeros(3, np.float32), var=np.ones(3,
         np.float32))),
         of_onnx(partial(batchnorm_model, mean=np.zeros(3, np.float32))), "layer 'norm'", "mean 0 and variance 1"),
    case(3, "in a function", "error",
         of_onnx(lambda: norm_model({}, mean=np.zeros(3, np.float32), var=np.ones(3, np.float32))),
         of_onnx(partial(in_a_function, MEAN)), "layer 'norm'"),
    case(4, "30 batches", "warning", of_small(both_counted(30)), of_small(both_counted(100)),
         "2 of 2 layers", "4.24%", "'standard' after 30 batches", "(var - r) / (1 - r)"),
    case(4, "a slow average", "warning", of_small(setting(momentum=0.01), counted(norm=300)),
         of_small(setting(momentum=None), counted(norm=1)), "layer 'body.norm'", "4.90%"),
    case(4, "a bare state", "warning", of_state(both_counted(20)), of_state(counted(standard=1)),
         "12.16%", "if its momentum was 0.1"),
    case(4, "not where it was measured", "warning", of_small(counted(norm=20)),
         of_small(counted(norm=20), settled=frozenset({"body.norm"})), "layer 'body.norm'", "12.16%"),
    case(4, "not where it cannot be", "warning", of_small(counted(norm=20), filled(running_var=0.13)),
         of_small(counted(norm=20), filled(running_var=0.12)), "12.16%"),
    case(5, "one layer", "error", of_small(lambda n: n.drop.train()), of_small(), "'drop'"),
    case(5, "in the code", "error", settled(partial(DropsAlways, knows=False), rows()),
         settled(partial(DropsAlways, knows=True), rows()), "p=0.35"),
    case(5, "ONNX", "error", of_onnx(partial(graphs.dropout_model, training=True)),
         of_onnx(partial(graphs.dropout_model, training=False)), "'drop'"),
    case(6, "statistics moved", "warning", of_small(shifted, reference=reference()), of_small(reference=reference()),
         "layer 'body.norm'", "0.75 standard deviations"),
    case(6, "another process", "warning", of_state(shifted, reference=wrapped_state("module.")),
         of_state(shifted, filled(weight_1=0.7), reference=reference()), "layer 'body.norm'", "0.75"),
    case(7, "counts like the rest", "warning", of_small(frozen), of_small(frozen, counted(norm=90)),
         "layer 'body.norm'", "500 training batches"),
    case(7, "nothing learns", "warning", of_small(frozen), of_small(frozen, lambda n: n.requires_grad_(False)), "500"),
    case(8, "twice", "warning", of_small(counted(norm=2 * STEPS)), of_small(), "'body.norm'", "1000", "500",
         "ratio of 2"),
    case(8, "a head that was put on later", "info", of_small(counted(norm=90)), of_small(), "90", "0.18"),
    case(8, "a state", "warning", of_state(counted(norm=250)), of_state(counted(standard=1)), "ratio of 0.5"),
    case(8, "frozen, and so an info", "info", of_small(frozen, counted(norm=90)), of_small(frozen), "90", "0.18"),
    *(case(8, f"{STEPS} in {steps} steps", "warning", of_small(steps=steps), of_small(steps=STEPS), "2 of 2 layers",
         says)
      for steps, says in ((250, "activation checkpointing"), (125, "4 times"), (480, "20 more"), (600, "100 fewer"))),
    case(9, "a module", "warning", of(averaged),
         of(averaged, settled=frozenset({"module.standard", "module.body.norm"})), "AveragedModel", "2 layers"),
    case(9, "a state", "warning", lambda: audit_state(wrapped_state("module.", n_averaged=torch.tensor(7))),
         lambda: audit_state(wrapped_state("module.")), "'n_averaged'"),
    case(10, "Keras's", "warning", of_small(setting(momentum=0.99)), of_small(setting(momentum=0.01)),
         "layer 'body.norm'", "0.99", "0.01 there"),
    case(10, "never", "warning", of_small(setting(momentum=0.0)), of_small(setting(momentum=None)), "momentum 0:"),
    case(10, "ONNX", "info", of_onnx(partial(norm_model, {"momentum": 0.1})), of_onnx(partial(norm_model, {})), "0.9"),
    case(11, "0", "warning", of_small(setting(eps=0.0)), of_small(setting(eps=1e-5)), "layer 'body.norm'", "eps 0"),
    case(11, "0 beside 0", "error", of_small(setting(eps=0.0), filled(running_var_3=0)),
         of_small(filled(running_var_3=0)),
         "layer 'body.norm'", "1 channel"),
    case(11, "mixed", "info", of_small(setting(eps=1e-3), filled(running_var_3=1e-3)),
         of_small(setting(eps=1e-3), lambda n: setattr(n.standard, "eps", 1e-3)), "1e-05, 0.001", "1 of 10 channels"),
    case(11, "unusual", "info", of_onnx(partial(norm_model, {"epsilon": 0.03})), of_onnx(partial(norm_model, {})),
         "0.03"),
    case(12, "NaN", "error", of_small(filled(running_var_3=float("nan"))), of_small(),
         "'body.norm' with 6 channels", "running_var is NaN in 1 channel"),
    case(12, "infinite", "error", of_state(filled(running_var=float("inf"), bias_1=float("nan"))), of_state(),
         "infinite in 6 channels", "beta is NaN in 1 channel"),
    case(12, "negative", "error", of_onnx(partial(batchnorm_model, var=-VAR)), of_onnx(batchnorm_model),
         "negative in 3"),
    case(13, "small", "info", of_small(filled(running_var_2=1e-7, running_mean_2=0, running_var_3=1e-6,
         running_mean_3=2)),
         of_small(filled(running_var_2=1e-7, weight_2=0)), "'body.norm'", "2 channels", "1 of them dead"),
    case(14, "large", "warning", of_small(filled(weight_4=40, running_var_4=0)), of_small(filled(running_var_4=0)),
         "layer 'body.norm'", "channel 4 by 1.26e+04"),
    case(15, "two of six", "info", of_small(filled(weight_1=0, weight_5=1e-8)), of_small(filled(weight_1=1e-3)),
         "layer 'body.norm'", "2 of 6 channels"),
    case(16, "stored so", "warning", of_small(in_half), of_small(), "2 of 2 layers", "float16"),
    case(16, "too large", "error", of_small(in_half, filled(running_var_2=float("inf"))), of_small(),
         "'body.norm'", "65504", "1 channel)"),
    case(16, "too small for float16 weights", "warning",
         of_onnx(lambda: norm_model({}, gamma=GAMMA.astype(np.float16), var=VAR * np.float32(1e-7))),
         of_onnx(lambda: norm_model({}, gamma=GAMMA.astype(np.float16))), "layer 'norm'", "3 channels"),
    case(17, "directly", "warning", of(sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.ReLU(), nn.BatchNorm1d(5))),
         of(sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.2))), "'1' (p=0.2)", "'3'", "0.25"),
    case(17, "a layer between", "info", of(sequential(nn.Dropout(0.2), nn.Linear(4, 5), nn.BatchNorm1d(5))),
         of(sequential(nn.Dropout(0.2), nn.Linear(4, 5), nn.Linear(5, 5), nn.BatchNorm1d(5))), "Linear between"),
    case(17, "seen running", "warning",
         settled(sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.ReLU(), nn.BatchNorm1d(5)), rows()),
         settled(sequential(nn.Linear(4, 5), nn.Dropout(0.0), nn.BatchNorm1d(5)), rows()), "'1' (p=0.2)", "'3'"),
    case(17, "seen running, a layer between", "info",
         settled(sequential(nn.Dropout(0.2), nn.Linear(4, 5), nn.BatchNorm1d(5)), rows()),
         settled(sequential(nn.Dropout(0.2), nn.Linear(4, 5), nn.Linear(5, 5), nn.BatchNorm1d(5)), rows()),
         "Linear between"),
    case(17, "ONNX", "warning", of_onnx(partial(dropped_before, linear=False)), of_onnx(batchnorm_model),
         "'drop' (p=0.4)"),
    case(17, "ONNX, a layer between", "info", of_onnx(partial(dropped_before, linear=True)), of_onnx(batchnorm_model),
         "'drop' (p=0.4)", "MatMul between"),
    case(18, "shape", "warning", of(Branching), of(Checking), "Branching._normalised, line 3", "batch_size != 1"),
    case(18, "len", "warning", of(BranchingByLength), of(Checking), "line 3", "len(x) > 1"),
    case(18, "size", "warning", of(BranchingBySize), of(Small), "x.size(0) == 1"),
    case(18, "tried, without effect", "info", settled(BranchingInVain, rows()), settled(Checking, rows()),
         "len(x) > 1"),
    case(19, "how many", "error", settled(Branching, rows()), settled(Checking, rows()), "1 row",
         "the number of rows matters"),
    case(19, "which", "error", settled(Centring, rows()), settled(Checking, rows()),
         "what stands beside a row matters"),
    case(19, "no answer", "error", settled(Squeezing, rows()), settled(Checking, rows()), "1 row",
         "[5] instead of [1, ...]"),
    case(19, "no statistics", "error", lambda: audit_module(without_statistics(), (rows(),)), of_small(inputs=True),
         "1 row", "Expected more than 1 value per channel"),
    case(20, "the mean", "warning", of_small(shifted, inputs=True), of_small(inputs=True), "layer 'body.norm'",
         "64 rows"),
    case(20, "the variance", "warning", of_small(filled(running_var=50), inputs=True),
         lambda: audit_module(small(), (rows(8, seed=6),)), "layer 'body.norm'"),
    case(21, "255", "warning", unlike(columns([0, 1, 2, 3], 255)), of_small(inputs=True), "'standard'",
         "multiplied by 255"),
    case(21, "1/255", "warning", unlike(columns([0, 1, 2, 3], 1 / 255)), of_small(inputs=True), "divided by 255"),
    case(21, "one column's unit", "warning", unlike(columns([0, 1, 2, 3], 1000, only=2)), of_small(inputs=True),
         "1000", "1 column, the first of them 2"),
    case(21, "standardised before", "warning", unlike(standard_rows()), of_small(inputs=True), "standardised already"),
    case(21, "not standardised", "warning",
         lambda: audit_module(small(lambda n: settle(n, standard_rows())), (rows(),)),
         lambda: audit_module(small(lambda n: settle(n, standard_rows())), (standard_rows(),)), "not standardised"),
    case(21, "order", "warning", unlike(columns([0, 2, 1, 3])), of_small(inputs=True), "2 columns moved",
         "1 is now at 2"),
    case(21, "behind a convolution", "warning",
         lambda: audit_module(settle(convolution(), series(padded=False)), (series(padded=False) * 255,)),
         settled(convolution, series(padded=False)), "'1'", "multiplied by 255"),
    case(22, "a row", "info", of_small(inputs=True), settled(convolution, series(padded=False)), "2 of 2 layers",
         "1 value"),
    case(22, "a last batch of 1", "warning", of_small(training_rows=97, batch_size=32),
         of_small(training_rows=98, batch_size=32), "97 training rows", "batches of 32", "2 of 2 layers"),
    case(23, "Linear", "warning", settled(partial(Sequence, transposed=False), tokens(padded=False)),
         settled(partial(Sequence, transposed=True), tokens(padded=False)), "'norm'", "7 channels", "linear in 'mix'"),
    case(23, "LSTM", "warning", settled(partial(Sequence, transposed=False, recurrent=True), tokens(padded=False)),
         settled(partial(Sequence, transposed=True, recurrent=True), tokens(padded=False)), "lstm in 'mix'",
         "[16, 7, 6]"),
    case(23, "ONNX", "warning", of_onnx(partial(sequence_model, transposed=False)),
         of_onnx(partial(sequence_model, transposed=True)), "layer 'norm'", "[batch, 3, 3]", "MatMul 'mix'"),
    case(24, "indices", "warning", settled(partial(Sequence, transposed=True), tokens(padded=True)),
         settled(partial(Sequence, transposed=True), tokens(padded=False)), "layer 'norm'", "30.4%"),
    case(24, "numbers", "warning", settled(convolution, series(padded=True)), settled(convolution,
         series(padded=False)),
         "layer '1'", "% of the positions"),
    case(25, "never run", "error", of(lambda: nn.Sequential(nn.LazyBatchNorm1d()).eval()), of_small(), "layer '0'"),
    case(25, "with rows", "error", of(lambda: nn.Sequential(nn.Linear(4, 5), nn.LazyBatchNorm1d()).eval(), rows()),
         of_small(inputs=True), "layer '1'"),
    case(25, "on the meta device", "error", of(lambda: nn.BatchNorm1d(4, device="meta").eval()), of_small(),
         "layer ''"),
    case(25, "a state", "error", lambda: audit_state(nn.LazyBatchNorm1d().state_dict()), of_state(), "(1 of 1)"),
    case(26, "tracks", "warning", of(sequential(nn.InstanceNorm2d(3, track_running_stats=True))),
         of(sequential(nn.InstanceNorm2d(3))), "layer '0'", "InstanceNorm2d"),
    case(27, "others only", "info", of(sequential(nn.GroupNorm(1, 4), nn.LayerNorm(4))), of_small(),
         "1 GroupNorm, 1 LayerNorm"),
    case(27, "a state", "info", lambda: audit_state({"weight": torch.ones(3)}), of_state(), "0 layers"),
    case(27, "ONNX", "info", of_onnx(graphs.mixing_model), of_onnx(batchnorm_model), "0 layers"),
    case(28, "with eps", "info", of(lambda: nn.Sequential(FrozenBatchNorm2d(3, 1e-5)).eval()), of_small(), "layer '0'"),
    case(28, "without eps", "warning", of(lambda: nn.Sequential(FrozenBatchNorm2d(3, 0.0)).eval()), of_small(),
         "eps 0"),
    case(29, "by its exporter", "info", of_onnx(partial(folded_model, "FuseBatchNormIntoGemm")),
         of_onnx(partial(folded_model, "FuseConsecutiveReshape")), "'body.norm'", "FuseBatchNormIntoGemm"),
    case(30, "kept", "info", of_onnx(partial(quantised_model, "Dequantize")), of_onnx(partial(quantised_model, "Relu")),
         "layer 'norm'"),
    case(30, "live", "warning", of(partial(qat, freezes=False)), of(partial(qat, freezes=True)), "layer '0.bn'"),
    *(case(31, f"opset {opset}", "info", of_onnx(partial(batchnorm_model, opset=opset)),
           of_onnx(partial(batchnorm_model, opset=healthy)), f"opset {opset}", "1 BatchNormalization")
      for opset, healthy in ((9, 7), (13, 14))),
    case(32, "a layer", "info", of(sequential(nn.SyncBatchNorm(3))), of_small(), "layer '0'", "SyncBatchNorm"),
    case(32, "a prefix", "info", lambda: audit_state(wrapped_state("module.")), of_state(), "'module.'", "2 layers"),
)  # fmt: skip


def ids(case: Case) -> str:
    return f"{case.rule} {case.label}"


def found(case: Case, findings: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in findings if finding.rule == case.rule]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_what_is_sick_is_found_and_named(case: Case) -> None:
    """One finding, as grave as it is, in a sentence with the layer and the figures."""
    findings = found(case, case.sick())
    gravest = [finding for finding in findings if finding.severity == case.severity]
    assert len(gravest) == 1, findings
    (finding,) = gravest
    for part in case.says:
        assert part in finding.message
    assert re.search(r"\d", finding.message)
    assert not finding.message.endswith(".")
    assert "\n" not in finding.message


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_its_healthy_twin_is_left_alone(case: Case) -> None:
    """The twin differs in this fault alone, so that it is this the rule looks at."""
    assert [finding for finding in found(case, case.well()) if finding.severity == case.severity] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_every_rule_is_tested_and_explained(rule: export.audit.Rule) -> None:
    """With a sick case of the severity the rule has at its gravest, and a page of three sections."""
    assert rule.severity in {case.severity for case in CASES if case.rule == rule.id}
    page = (ROOT / "docs" / "rules" / f"{rule.id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {rule.id}: {rule.title}\n")
    sections = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert sections[:3] == ["Symptom", "Cause", "Fix"]
    assert sections[3:] in ([], ["Sources"])


def test_every_page_has_its_rule() -> None:
    assert sorted(page.stem for page in (ROOT / "docs" / "rules").glob("BN*.md")) == [rule.id for rule in RULES]


def test_ids_are_in_order_and_severities_known() -> None:
    assert [rule.id for rule in RULES] == [f"BN{number:03}" for number in range(1, len(RULES) + 1)]


def test_the_table_of_failure_modes_is_true() -> None:
    """Each failure mode names its rules, each rule stands there, and nothing is promised that is no rule."""
    table = dict(re.findall(r"^    (F\d+) .*?((?:BN\d{3}(?:, )?)+|-)$", export.audit.__doc__ or "", re.MULTILINE))
    assert list(table) == [f"F{number}" for number in range(1, 20)]
    named = {rule for row in table.values() for rule in row.split(", ")}
    assert named - {"-"} == {rule.id for rule in RULES}


# No false alarms


def grave(findings: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in findings if finding.severity != "info"]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_network_is_left_alone(name: str) -> None:
    """As a module with and without rows, held against itself, as a state and as ONNX."""
    network, inputs = HEALTHY[name]()
    state = network.state_dict()
    told: dict[str, Any] = {"training_rows": 240, "batch_size": 24, "reference": state}
    assert grave(audit_module(network, steps=120, **told)) == []
    assert grave(audit_module(network, inputs, steps=120, **told)) == []
    assert grave(audit_module(network, tuple(tensor[:5] for tensor in inputs))) == []
    assert grave(audit_state(state, steps=120, **told)) == []
    assert grave(audit_onnx(converted(name).model, reference=state)) == []


@pytest.mark.parametrize("name", HEALTHY)
def test_one_network_has_the_same_statistics_wherever_it_is_read(name: str) -> None:
    """A fault put into it is found in the module, in the state and in the ONNX file, at the same layer."""
    network, _ = HEALTHY[name]()
    model = copy.deepcopy(converted(name).model)
    sick = copy.deepcopy(network)
    layer = [path for path, part in sick.named_modules() if isinstance(part, _BatchNorm)][-1]
    norm = sick.get_submodule(layer)
    norm.get_buffer("running_var")[0] = float("inf")
    node = next(n for n in model.graph.node if n.op_type == "BatchNormalization" and n.name.startswith(f"{layer}/"))
    tensor = next(t for t in model.graph.initializer if t.name == node.input[4])
    tensor.CopyFrom(numpy_helper.from_array(norm.get_buffer("running_var").numpy(), tensor.name))
    for findings in (audit_module(sick), audit_state(sick.state_dict()), audit_onnx(model)):
        (finding,) = [finding for finding in findings if finding.severity == "error"]
        assert (finding.rule, finding.layer) == ("BN012", layer)


# Nothing is changed


def bits(module: nn.Module) -> dict[str, bytes]:
    return {key: value.detach().numpy().tobytes() for key, value in module.state_dict(keep_vars=True).items()}


def modes(module: nn.Module) -> list[tuple[str, bool, int, int]]:
    return [
        (path, part.training, len(part._forward_hooks), len(part._forward_pre_hooks))
        for path, part in module.named_modules()
    ]


class Raising(Small):
    """Fails half-way, after its first BatchNorm has run; and writes down that it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(len(x))
        raise RuntimeError(f"no answer after {float(self.standard(x).sum()):.0f}")


@pytest.mark.parametrize("make", [Small, Branching, BatchStatistics, partial(DropsAlways, knows=False), Raising])
@pytest.mark.parametrize("training", [False, True])
def test_the_module_is_bit_for_bit_what_it_was(make: Callable[[], nn.Module], training: bool) -> None:
    """Also where it is in training mode, where its code raises, and in what its code keeps to itself."""
    module = make().train(training)
    seen: list[int] = []
    handle = module.register_forward_hook(lambda _module, _args, _output: seen.append(1))
    before, were = bits(module), modes(module)
    drawn = torch.get_rng_state()
    x = rows(8)
    kept = x.clone()
    if make is Raising:
        with pytest.raises(Refused, match="the network fails on the sample: no answer after"):
            audit_module(module, (x,))
        assert vars(module)["runs"] == []
    else:
        audit_module(module, (x,))
    assert bits(module) == before
    assert modes(module) == were
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), drawn)
    handle.remove()


def test_the_onnx_model_is_not_changed() -> None:
    model = in_a_function(MEAN)
    before = model.SerializeToString()
    audit_onnx(model)
    assert model.SerializeToString() == before


# Details


def test_statistics_are_looked_up_by_place_and_not_by_name() -> None:
    """Exporters alias equal tensors: here running_mean is called 'beta', and beta 'running_mean'."""
    vectors = {"gamma": GAMMA, "beta": MEAN, "running_mean": np.full(3, np.nan, np.float32), "var": VAR}
    node = helper.make_node("BatchNormalization", ["x", "gamma", "running_mean", "beta", "var"], ["y"], name="norm")
    (finding,) = grave(audit_onnx(graphs.model([node], vectors)))
    assert "beta is NaN in 3 channels" in finding.message


def test_a_function_is_read_with_what_its_caller_gives() -> None:
    (finding,) = grave(audit_onnx(in_a_function(MEAN * np.float32(np.nan))))
    assert (finding.rule, finding.severity) == ("BN012", "error")
    assert "running_mean is NaN in 3 channels" in finding.message


def test_onnx_momentum_is_the_weight_of_the_old_value() -> None:
    """The file's 0.9 is PyTorch's 0.1; 1.0 is how a cumulative average is written; neither is worth a word."""
    for momentum in (0.9, 1.0):
        assert [f for f in audit_onnx(norm_model({"momentum": momentum})) if f.rule == "BN010"] == []


def test_the_correction_in_the_message_is_exact() -> None:
    """mean / (1 - r) and (var - r) / (1 - r) take the initial values out of a moving average."""
    norm = nn.BatchNorm1d(4)
    x = rows(50)
    for _ in range(20):
        norm(x)
    (finding,) = [f for f in audit_module(norm.eval()) if f.rule == "BN004"]
    r = float(re.search(r"r = ([\d.]+)%", finding.message)[1]) / 100  # type: ignore[index]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean / (1 - r), x.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((norm.running_var - r) / (1 - r), x.var(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [4, 16, 200])
def test_a_sample_of_the_training_data_is_no_finding(seed: int, count: int) -> None:
    """However few rows it has: the error of the sample is allowed for, and that of its own estimate."""
    findings = audit_module(small(), (rows(count, seed=100 + seed),))
    assert [finding for finding in findings if finding.rule in ("BN020", "BN021")] == []


def test_the_rows_count_and_not_the_pixels() -> None:
    """Rows with a level of their own: 4 of them say little of the mean, however many positions each has."""
    generator = torch.Generator().manual_seed(7)

    def images(count: int) -> Tensor:
        return torch.randn(count, 5, 1, 1, generator=generator) + 0.1 * torch.randn(
            count, 5, 20, 20, generator=generator
        )

    network = settle(nn.Sequential(nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(2000, 2)), images(400))
    for _ in range(20):
        assert [f for f in audit_module(network, (images(4),)) if f.rule == "BN020"] == []


def test_a_layer_that_is_used_twice_is_judged_by_both() -> None:
    """Its running statistics are those of both inputs together."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.norm(x) + self.norm(x + 400))

    network, x = Twice(), rows()
    both = torch.cat([x, x + 400])
    network.norm.running_mean, network.norm.running_var = both.mean(0), both.var(0)
    assert [f.rule for f in audit_module(network.eval(), (x,)) if f.rule in ("BN020", "BN021")] == []


def test_few_rows_are_doubted() -> None:
    """One channel and four rows, whose error is itself known by four rows only."""
    network = settle(nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2)), rows(4000)[:, :1])
    for seed in range(100):
        assert [f for f in audit_module(network, (rows(4, seed=seed)[:, :1],)) if f.rule == "BN020"] == []


@pytest.mark.parametrize(("batch_size", "found"), [(2, 0), (64, 1)])
def test_the_noise_of_small_batches_is_allowed_for(batch_size: int, found: int) -> None:
    """A running mean of batches of 2 rows may be 0.49 standard deviations away, one of larger batches 0.25."""

    def off(network: Small) -> None:
        network.norm.get_buffer("running_mean").add_(0.4 * network.norm.get_buffer("running_var").sqrt())

    findings = audit_module(small(off), (rows(4000),), batch_size=batch_size)
    assert len([finding for finding in findings if finding.rule == "BN020"]) == found


def test_rounding_is_no_variance() -> None:
    """A constant column has a variance of rounding errors, in training and here, and none like the other."""
    network = settle(nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1), nn.Linear(1, 2)), rows())
    network.get_submodule("1").get_buffer("running_var").fill_(1e-12)
    constant = torch.full((64, 4), 0.1)
    network.get_submodule("1").get_buffer("running_mean").copy_(network.get_submodule("0")(constant)[0].detach())
    assert [f for f in audit_module(network, (constant,)) if f.rule in ("BN020", "BN021")] == []


class Before(nn.Module):
    """A BatchNorm behind something that leaves its four columns what they are, or does not."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.norm = change, nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.norm(self.change(x)))


@pytest.mark.parametrize(
    ("change", "named"), [(lambda x: x.flatten(1).contiguous(), 1), (lambda x: functional.softplus(x), 0)]
)
def test_only_columns_of_the_input_are_named_as_columns(change: Callable[[Tensor], Tensor], named: int) -> None:
    """Behind an activation a channel is no column any more, whatever its scale."""
    network = settle(Before(change), rows())
    norm = network.get_submodule("norm")
    norm.get_buffer("running_mean")[3] /= 1000
    norm.get_buffer("running_var")[3] /= 1000**2
    assert len([f for f in audit_module(network, (rows(),)) if f.rule == "BN021"]) == named


def test_a_dropout_in_training_mode_is_told_once() -> None:
    assert [f.rule for f in audit_module(small(lambda n: n.drop.train())) if f.severity == "error"] == ["BN005"]


def test_statistics_measured_at_once_are_no_moving_average() -> None:
    """In a state a counter of 1 beside others is a cumulative average of one batch: all rows."""
    state = small(counted(standard=1)).state_dict()
    state["standard.running_var"] = torch.full((4,), 7.0)
    assert grave(audit_state(state, steps=STEPS)) == []
    assert [f.rule for f in grave(audit_state({k: v for k, v in state.items() if "body" not in k}))] == ["BN004"]


def test_a_name_computed_inside_a_body_hides_the_constant_outside() -> None:
    """gamma inside the branch is not the NaN of the same name around it."""
    model = in_an_if()
    body = next(found.g for found in model.graph.node[0].attribute if found.name == "then_branch")
    body.node.insert(0, helper.make_node("Abs", ["beta"], ["gamma"]))
    tensor = next(t for t in model.graph.initializer if t.name == "gamma")
    tensor.CopyFrom(numpy_helper.from_array(GAMMA * np.float32(np.nan), "gamma"))
    assert grave(audit_onnx(model)) == []


def test_a_dropout_far_before_is_left_alone() -> None:
    """With two weighted layers between, its effect on the variance is mixed away."""
    model = dropped_before(linear=True)
    model.graph.node[1].output[0] = "once"
    model.graph.node.insert(2, helper.make_node("MatMul", ["once", "w"], ["h"]))
    assert [finding for finding in audit_onnx(model) if finding.rule == "BN017"] == []


def test_a_residual_beside_dropout_is_no_dropout_before() -> None:
    """In eval mode a Dropout returns the very tensor it was given; the way around it has not been dropped."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(0.3), nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return torch.as_tensor(self.head(self.drop(h)) + self.norm(h)[:, :2])

    findings = audit_module(settle(Residual(), rows()), (rows(),))
    assert [finding for finding in findings if finding.rule == "BN017"] == []


def test_a_network_written_for_one_dtype_is_probed_in_it() -> None:
    """Nothing is missed where float64 is refused."""

    class Single(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return torch.as_tensor(self.norm(y) if len(x) > 1 else y) @ torch.ones(5, 2)

    assert "BN019" in {finding.rule for finding in audit_module(settle(Single(), rows()), (rows(),))}


def test_a_scripted_network_is_probed_from_outside() -> None:
    """It takes no hooks; whether a row depends on its company is seen all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False)))
        assert "BN019" in {finding.rule for finding in audit_module(scripted.eval(), (rows(),))}


def test_a_large_state_is_audited_within_a_second() -> None:
    """As many layers and channels as a ResNet-50 has, beside its 25 million weights."""
    state: dict[str, Tensor] = {"fc.weight": torch.zeros(25_000_000)}
    for i in range(53):
        generator = torch.Generator().manual_seed(i)
        for name in ("weight", "bias", "running_mean"):
            state[f"layer{i}.bn.{name}"] = torch.randn(512, generator=generator)
        state[f"layer{i}.bn.running_var"] = torch.rand(512, generator=generator) + 0.1
        state[f"layer{i}.bn.num_batches_tracked"] = torch.tensor(1000)
    started = time.perf_counter()
    assert grave(audit_state(state, reference=state)) == []
    assert time.perf_counter() - started < 1


def test_onnx_files_are_audited_without_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; import onnx\n"
        "from export.audit import audit_onnx, rendering\n"
        "from tests.graphs import batchnorm_model\n"
        "findings = audit_onnx(batchnorm_model(training=True)); rendering.table(findings, file=sys.stdout)\n"
        "sys.exit(findings[0].rule != 'BN001')"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=50, capture_output=True).returncode == 0


# Rendering

FINDINGS = (
    Finding(rule="BN003", severity="error", layer="a[0]", message="layer 'a[0]' has mean 0", layers=("a[0]", "b")),
    Finding(rule="BN020", severity="warning", layer="b", message="layer 'b' is 3 away", layers=("b",)),
    Finding(rule="BN027", severity="info", layer="", message="0 layers, [bold]nothing[/bold]"),
)


def test_json() -> None:
    document = json.loads(rendering.json(FINDINGS))
    assert document["counts"] == {"error": 1, "warning": 1, "info": 1}
    assert document["findings"][0] == {
        "rule": "BN003",
        "severity": "error",
        "layer": "a[0]",
        "layers": ["a[0]", "b"],
        "message": "layer 'a[0]' has mean 0",
        "help": "docs/rules/BN003.md",
    }
    assert json.loads(rendering.json(())) == {"findings": [], "counts": {"error": 0, "warning": 0, "info": 0}}


def test_sarif() -> None:
    """What code scanning reads: every rule with its page, every result with its level and its layers."""
    document = json.loads(rendering.sarif(FINDINGS, target="models/credit/1/model.onnx"))
    assert document["version"] == "2.1.0"
    (run,) = document["runs"]
    driver = run["tool"]["driver"]
    assert [rule["id"] for rule in driver["rules"]] == [rule.id for rule in RULES]
    assert all((ROOT / rule["helpUri"]).is_file() for rule in driver["rules"])
    assert [result["level"] for result in run["results"]] == ["error", "warning", "note"]
    for result in run["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"]["uri"] == "models/credit/1/model.onnx"
    assert [place["fullyQualifiedName"] for place in run["results"][0]["locations"][0]["logicalLocations"]] == [
        "a[0]",
        "b",
    ]


def test_the_table() -> None:
    """Brackets in names and messages are text, and the gravest come first."""
    file = io.StringIO()
    rendering.table(FINDINGS[::-1], file=file)
    printed = file.getvalue()
    assert printed.index("BN003") < printed.index("BN020") < printed.index("BN027")
    assert "a[0]" in printed
    assert "[bold]nothing[/bold]" in printed
    assert "1 error, 1 warning, 1 info;" in printed
    file = io.StringIO()
    rendering.table((), file=file)
    assert file.getvalue() == "no findings\n"
