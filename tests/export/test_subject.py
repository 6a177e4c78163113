"""What is exported: a copy in eval mode, with names for what goes in and comes out."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.cost import budget
from export.exporting import export_model
from export.subject import of_module
from service.errors import Refused, WrongCall
from service.runtime import OnnxRuntime, place
from tests.export.zoo import rows, settled

X = rows(9, 5)
Pair = namedtuple("Pair", ["mean", "spread"])


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Gives(nn.Module):
    """A network whose forward puts its answers into any kind of container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.kind = nn.BatchNorm1d(5), kind

    def forward(self, x: Tensor) -> Any:
        a, b = self.norm(x), x.sum(1)
        made: dict[str, Any] = {
            "tensor": a,
            "tuple": (a, b),
            "dict": {"logits": a, "the sum": b},
            "namedtuple": Pair(a, b),
            "dataclass": Answer(a, b),
            "nested": {"a": [a, b]},
            "nothing": "no tensor at all",
        }
        return made[self.kind]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("tensor", ("output",)),
        ("tuple", ("output_0", "output_1")),
        ("dict", ("logits", "the_sum")),
        ("namedtuple", ("mean", "spread")),
        ("nested", ("output_0", "output_1")),
    ],
)
def test_outputs_are_called_what_forward_calls_them(kind: str, names: tuple[str, ...]) -> None:
    assert of_module(Gives(kind), X).output_names == names


def test_an_output_called_like_an_input_gets_another_name() -> None:
    assert of_module(Gives("dict"), {"logits": X}).output_names == ("logits_output", "the_sum")
    with pytest.raises(WrongCall, match="a tensor is named twice"):
        of_module(Gives("tensor"), {"x": X}, output_names=["x"])


def test_a_forward_without_tensors() -> None:
    with pytest.raises(Refused, match="gives a str without tensors"):
        of_module(Gives("nothing"), X)


def test_it_is_a_copy_in_eval_mode() -> None:
    network = Gives("tensor").train()
    subject = of_module(network, X)
    assert network.training
    assert not any(part.training for part in subject.module.modules())
    assert subject.module is not network


@pytest.mark.parametrize("sample", [X, X.numpy(), [X], {"rows": X}])
def test_rows_come_in_any_form(sample: Any) -> None:
    subject = of_module(Gives("tensor"), sample)
    assert torch.equal(subject.inputs[0], X)
    assert subject.input_names == (("rows",) if isinstance(sample, dict) else ("input",))


class Minus(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left - right


def test_rows_by_name_go_to_their_arguments() -> None:
    """In whatever order a dictionary has them."""
    subject = of_module(Minus(), {"right": X, "left": 2 * X})
    assert subject.input_names == ("left", "right")
    assert torch.equal(subject.module(*subject.inputs), X)
    with pytest.raises(WrongCall, match="the sample has 'a', 'b', but forward takes 'left', 'right'"):
        of_module(Minus(), {"a": X, "b": X})


def test_what_is_no_network() -> None:
    with pytest.raises(WrongCall, match=r"the network is a type; give a torch.nn.Module"):
        of_module(Minus, X)  # type: ignore[arg-type]


def test_probabilities_are_made_only_on_request() -> None:
    network = settled(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), X)
    with pytest.raises(Refused, match="--softmax serves the softmax"):
        of_module(network, X, classes=["a", "b", "c"])
    subject = of_module(network, X, classes=["a", "b", "c"], softmax=True)
    with torch.no_grad():
        torch.testing.assert_close(subject.module(X), network(X).softmax(1))
    assert list(dict(subject.network.named_modules())) == list(dict(network.named_modules()))


@pytest.mark.parametrize(
    ("classes", "kind", "sentence"),
    [(["a"] * 5, "tensor", "a class twice"), (["a", "b"], "tuple", "one output"), (["a"], "tensor", "names 1")],
)
def test_classes_that_do_not_fit(classes: list[str], kind: str, sentence: str) -> None:
    with pytest.raises(WrongCall, match=sentence):
        of_module(Gives(kind), X, classes=classes)


@pytest.mark.parametrize("where", ["weights", "rows"])
def test_bfloat16_is_refused_with_the_way_out(where: str) -> None:
    network = settled(nn.Sequential(nn.BatchNorm1d(5)), X)
    with pytest.raises(Refused, match=r"is bfloat16, .* network.float\(\)"):
        of_module(network.bfloat16() if where == "weights" else network, X.bfloat16())


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_network_that_cannot_be_copied_is_refused() -> None:
    """The old weight_norm keeps a computed tensor once it has run; the sentence names the way out."""
    network = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(5, 3)), nn.BatchNorm1d(3))
    network(X)
    with pytest.raises(Refused, match=r"cannot be copied: .*torch.nn.utils.parametrizations"):
        of_module(network, X)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_network_is_refused() -> None:
    with pytest.raises(WrongCall, match="a scripted module"):
        of_module(torch.jit.script(nn.Sequential(nn.BatchNorm1d(5))), X)


def test_a_network_for_one_batch_size_is_refused(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(9, 5) * 2

    with pytest.raises(Refused, match="fails on a batch of 2, and it must take any number of rows"):
        export_model(Fixed(), X, name="net", models=tmp_path)


def test_a_label_has_no_distance_from_train_mode(tmp_path: Path) -> None:
    """It is another one or the same; no infinity reaches the passport or the report."""

    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            scores = self.norm(x)
            return {"scores": scores, "label": scores.argmax(1)}

    exported = export_model(settled(Labels(), X), X, name="net", models=tmp_path)
    assert list(exported.passport.provenance["train_eval_divergence"]) == ["scores"]  # type: ignore[arg-type]
    assert " inf" not in exported.report.read_text(encoding="utf-8")


def test_instance_norm_with_running_statistics_is_exported_as_what_it_is(tmp_path: Path) -> None:
    """In eval mode it is a BatchNorm; as the exporter writes it, its statistics look computed (notes, F19)."""
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    network = nn.Sequential(nn.Conv2d(3, 4, 2), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 2)).train()
    x = rows(12, 3, 4, 4)
    for _ in range(60):
        network(x)
    exported = export_model(network, x, name="net", models=tmp_path)
    assert [layer.layer for layer in exported.passport.batchnorm] == ["1"]
    (got,) = OnnxRuntime((exported.folder / "model.onnx").read_bytes(), place("cpu")).run([x.numpy()])
    with torch.no_grad():
        np.testing.assert_allclose(got, network.eval()(x).numpy(), rtol=1e-4, atol=1e-5)
    assert isinstance(network[1], nn.InstanceNorm2d)


def test_a_large_network_is_checked_with_fewer_rows() -> None:
    """By a count of multiplications: the same on any machine."""
    small = budget(nn.Linear(5, 3).eval(), [X])
    assert (small.sample, small.analysed, small.batch, small.trials_per_axis) == (64, 64, 64, 3)
    large = budget(nn.Conv2d(3, 64, 7, padding=3).eval(), [torch.zeros(2, 3, 960, 960)])  # 1.7e10 for an image
    assert (large.sample, large.analysed, large.batch, large.trials_per_axis) == (3, 3, 3, 1)
