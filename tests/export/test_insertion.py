"""BatchNorm put into a trained network changes nothing in eval mode, and what would is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from export import insertion
from export.conversion import convert
from export.insertion import CHILD, Inserted, NormSpec, attach, insert
from service.errors import Refused, WrongCall
from tests.export.zoo import Tabular, rows, tabular_inputs

AFTER = ("features.1", "features.4", "classifier.0", "classifier.1")


class VGG(nn.Module):
    """Convolutions and a head with dropout, without BatchNorm: the classic case."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()
        )
        self.classifier = nn.Sequential(nn.Linear(8 * 16, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.classifier(self.features(x).flatten(1))
        return answer


IMAGES = rows(70, 3, 8, 8, mean=0.4, std=1.3)


@pytest.fixture(scope="module")
def inserted() -> Inserted:
    return insert(VGG().eval(), AFTER, [IMAGES])


def answers(module: nn.Module, x: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        output: Tensor = copy.deepcopy(module).eval()(x)
    return output


def norm_of(module: nn.Module, layer: str) -> _BatchNorm:
    norm = module.get_submodule(f"{layer}.{CHILD}")
    assert isinstance(norm, _BatchNorm)
    return norm


def test_eval_mode_does_not_change(inserted: Inserted) -> None:
    """On rows that were measured and on others; every decision is the same."""
    for x in (IMAGES, rows(40, 3, 8, 8, mean=-1.0, std=2.0, seed=9)):
        before, after = answers(VGG(), x), answers(inserted.module, x)
        assert float((before - after).abs().max()) <= 1e-5 * float(before.abs().max())
        assert torch.equal(before.argmax(1), after.argmax(1))
    assert [layer.layer for layer in inserted.layers] == list(AFTER)
    assert all(layer.error <= 1e-6 * layer.range for layer in inserted.layers)
    assert all(layer.gain == pytest.approx(1, abs=1e-6) for layer in inserted.layers)
    assert inserted.output_error <= 1e-6


def test_the_new_layers_hold_the_statistics_of_the_data(inserted: Inserted) -> None:
    """So that train mode begins near the function that there was; and gamma = sqrt(var + eps), beta = mean."""
    first_two = nn.Sequential(VGG().features[0], VGG().features[1])
    hidden = answers(first_two).transpose(0, 1).flatten(1)
    norm = norm_of(inserted.module, "features.1")
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, hidden.mean(1))
    torch.testing.assert_close(norm.running_var, hidden.var(1, correction=0))
    torch.testing.assert_close(norm.weight.detach(), (norm.running_var + norm.eps).sqrt())
    assert torch.equal(norm.bias.detach(), norm.running_mean)
    assert int(norm.num_batches_tracked or 0) == 1


def test_all_rows_count_however_many() -> None:
    """Measured and certified in parts: sorted rows, so that no part is like the whole."""
    x = rows(700, 5)
    x = x[x[:, 0].argsort()]
    whole = nn.Sequential(nn.Linear(5, 4), nn.Flatten()).eval()
    found = insert(whole, ["0"], [x])
    hidden, norm = answers(whole, x), norm_of(found.module, "0")
    torch.testing.assert_close(norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(norm.running_var, hidden.var(0, correction=0))
    assert found.layers[0].range == float(hidden.max() - hidden.min())
    assert found.rows == 700


def test_eps_momentum_and_mode_are_those_asked_for() -> None:
    """In a fresh network as well, and the mode is that of the layer before it."""
    network = VGG().train()
    network.classifier.eval()
    found = insert(network, ("features.1", "classifier.0"), [IMAGES], eps=0.03, momentum=0.2)
    fresh = VGG()
    attach(fresh, found.specs)
    for module in (found.module, fresh):
        norm = norm_of(module, "features.1")
        assert (norm.eps, norm.momentum, norm.training) == (0.03, 0.2, True)
    assert not norm_of(found.module, "classifier.0").training
    torch.testing.assert_close(answers(found.module), answers(network))


def test_train_mode_does_change_and_it_is_said_by_how_much(inserted: Inserted) -> None:
    """The function is preserved in eval mode only; smaller batches move it more."""
    assert inserted.shift is not None
    assert inserted.shift.batch_size == 32
    assert 0 < inserted.shift.median < inserted.shift.largest
    small = insert(VGG().eval(), AFTER, [IMAGES], batch_size=4).shift
    assert small is not None
    assert small.median > 1.5 * inserted.shift.median


def test_the_users_network_is_bit_for_bit_what_it_was() -> None:
    network = VGG().train()
    before = copy.deepcopy(network.state_dict())
    found = insert(network, AFTER[:1], [IMAGES])
    assert network.training
    assert found.module.training
    assert all(not part._forward_hooks for part in network.modules())
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_every_key_stays_and_norms_come_in_addition(inserted: Inserted) -> None:
    keys = set(inserted.module.state_dict())
    assert set(VGG().state_dict()) < keys
    added = keys - set(VGG().state_dict())
    assert {key.rsplit(".", 1)[0] for key in added} == {f"{layer}.{CHILD}" for layer in AFTER}


def test_a_fresh_network_takes_the_new_state(inserted: Inserted) -> None:
    """What `--weights` does with a file of `evalmode insert`."""
    fresh = VGG()
    attach(fresh, {layer: NormSpec(**spec.model_dump()) for layer, spec in inserted.specs.items()})
    fresh.load_state_dict(inserted.module.state_dict())
    assert torch.equal(answers(fresh), answers(inserted.module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_it_can_be_copied_and_pickled(inserted: Inserted, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    assert torch.equal(answers(duplicate(inserted.module)), answers(inserted.module))


@pytest.mark.parametrize(
    ("network", "shape", "kind"),
    [
        (nn.Linear(5, 4), (5,), nn.BatchNorm1d),
        (nn.Conv1d(3, 4, 2), (3, 6), nn.BatchNorm1d),
        (nn.Conv2d(3, 4, 2), (3, 6, 5), nn.BatchNorm2d),
        (nn.Conv3d(3, 4, 2), (3, 6, 5, 4), nn.BatchNorm3d),
        (nn.Sequential(nn.Conv1d(3, 4, 2), nn.LayerNorm([4, 5]), nn.GELU()), (3, 6), nn.BatchNorm1d),
        (nn.Linear(5, 4).double(), (5,), nn.BatchNorm1d),
    ],
)
def test_the_kind_is_that_of_the_output(network: nn.Module, shape: tuple[int, ...], kind: type[_BatchNorm]) -> None:
    """1d, 2d or 3d, in the network's own dtype; its channels are axis 1."""
    x = rows(9, *shape).to(next(network.parameters()).dtype)
    whole = nn.Sequential(network, nn.Flatten()).eval()
    found = insert(whole, ["0"], [x])
    norm = norm_of(found.module, "0")
    assert type(norm) is kind
    assert (norm.num_features, norm.weight.dtype) == (4, x.dtype)
    fresh = copy.deepcopy(whole)
    attach(fresh, found.specs)
    fresh.load_state_dict(found.module.state_dict())
    assert torch.equal(answers(fresh, x), answers(found.module, x))


def test_behind_a_sequential_it_is_the_last_child() -> None:
    """Which runs all of its children by itself, so a hook would run BatchNorm a second time."""
    found = insert(VGG().eval(), ["features"], [IMAGES])
    runs = []
    norm_of(found.module, "features").register_forward_hook(lambda *_: runs.append(1))
    torch.testing.assert_close(answers(found.module), answers(VGG()), rtol=1e-5, atol=1e-5)
    assert runs == [1]
    graph = convert(copy.deepcopy(found.module).eval(), [IMAGES], input_names=["x"], output_names=["y"])
    assert [layer.layer for layer in graph.layers] == ["features.norm"]


def test_several_inputs_and_outputs() -> None:
    network, inputs = Tabular().eval(), tabular_inputs()
    found = insert(network, ["embeddings.0", "head"], inputs)
    before, after = (module.eval()(*inputs) for module in (network, found.module))
    for name, output in before.items():
        torch.testing.assert_close(after[name], output)


def test_it_is_exported_with_the_new_layers_by_name(inserted: Inserted) -> None:
    found = convert(copy.deepcopy(inserted.module).eval(), [IMAGES], input_names=["x"], output_names=["y"])
    assert [layer.layer for layer in found.layers] == [f"{layer}.{CHILD}" for layer in AFTER]


# The recipes that are wrong


def test_gamma_must_be_the_standard_deviation() -> None:
    """The recipe of the well-known notebook sets it to the variance, and changes every answer (notes, fact 8)."""
    right = insert(VGG().eval(), AFTER, [IMAGES]).module
    wrong = copy.deepcopy(right)
    for layer in AFTER:
        norm = norm_of(wrong, layer)
        assert norm.running_var is not None
        norm.weight.data.copy_(norm.running_var)
    before = answers(VGG())
    assert float((answers(right) - before).abs().max()) <= 1e-6
    assert float((answers(wrong) - before).abs().max()) > 0.1 * float(before.abs().max())


@pytest.mark.parametrize("recipe", ["variance", "without eps"])
def test_the_certificate_finds_a_wrong_recipe(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its guard bites: with a standard deviation of 0.01, eps alone is 5 %."""
    right = insertion._make_identity

    @torch.no_grad()
    def wrong(norm: _BatchNorm, mean_C: Tensor, var_C: Tensor) -> None:
        right(norm, mean_C, var_C)
        norm.weight.copy_(var_C if recipe == "variance" else var_C.sqrt())

    monkeypatch.setattr(insertion, "_make_identity", wrong)
    network = nn.Sequential(nn.Identity(), nn.Linear(5, 3)).eval()
    with pytest.raises(Refused, match="behind '0' is no identity: it is"):
        insert(network, ["0"], [rows(40, 5, mean=1.0, std=0.01)])


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [
        (lambda y: y, "the network decides otherwise in row"),
        (lambda y: y.argmax(1), "an output of whole numbers changes"),
        (lambda y: y.amax(1), "the outputs move by"),
    ],
)
def test_the_outputs_are_certified_as_well(
    outputs: Callable[[Tensor], Tensor], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of output has a guard that bites, with the layers' own guard out of the way."""

    class Head(VGG):
        def forward(self, x: Tensor) -> Tensor:
            return outputs(super().forward(x))

    right = insertion._make_identity

    @torch.no_grad()
    def wrong(norm: _BatchNorm, mean_C: Tensor, var_C: Tensor) -> None:
        right(norm, mean_C, var_C)
        norm.weight.neg_()

    monkeypatch.setattr(insertion, "_make_identity", wrong)
    monkeypatch.setattr(insertion, "LAYER_TOLERANCE", 1e9)
    with pytest.raises(Refused, match=sentence):
        insert(Head().eval(), ["classifier.3"], [IMAGES])


def test_a_nan_is_no_small_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest of 0 and NaN is 0 in Python, and a certificate would hold."""
    right = insertion._make_identity

    @torch.no_grad()
    def wrong(norm: _BatchNorm, mean_C: Tensor, var_C: Tensor) -> None:
        right(norm, mean_C, var_C)
        norm.bias[0] = torch.nan

    monkeypatch.setattr(insertion, "_make_identity", wrong)
    with pytest.raises(Refused, match=r"behind 'features\.0' is no identity: it is inf off"):
        insert(Trimmed().eval(), ["features.0"], [IMAGES])


def test_dead_channels_are_counted() -> None:
    """What is always 0 behind a ReLU becomes gamma = sqrt(eps): still an identity, but one to know of."""
    network = VGG().eval()
    first = network.features[0]
    assert isinstance(first, nn.Conv2d)
    assert first.bias is not None
    first.bias.data[2] = -1000.0
    (layer,) = insert(network, ["features.1"], [IMAGES]).layers
    assert layer.dead_channels == 1


# What it refuses


class Trimmed(VGG):
    """What is not a number behind its first layer does not reach the outputs."""

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.classifier(self.features[1:](self.features[0](x).nan_to_num(0.0)).flatten(1))
        return answer.sum(1)


class Logarithm(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log()


class Children(nn.Module):
    """Runs whatever children it has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.linear(self.linear(x))
        return answer


class Table(nn.Module):
    """A layer whose output has no batch axis: five positions of four features, whatever the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.made = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.made(torch.ones(5, 3))
        return x + made.sum()


SEQUENCE = nn.Sequential(nn.Linear(5, 4), nn.LSTM(4, 3, batch_first=True))


@pytest.mark.parametrize(
    ("network", "after", "x", "error", "sentence"),
    [
        (VGG(), ["features.11"], IMAGES, WrongCall, "no layer 'features.11'; did you mean 'features.1'"),
        (VGG(), [], IMAGES, WrongCall, "name at least one layer"),
        (Twice(), ["linear"], rows(4, 5), Refused, "layer 'linear' runs 2 times"),
        (Twice(), ["spare"], rows(4, 5), Refused, "layer 'spare' runs 0 times"),
        (SEQUENCE, ["0"], rows(4, 6, 5), Refused, r"\[2, 6, 4\] with its features on the last axis"),
        (SEQUENCE, ["1"], rows(4, 6, 5), Refused, "layer '1' gives a tuple"),
        (
            nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Dropout()),
            ["2"],
            rows(4, 6, 5),
            Refused,
            "features on the last",
        ),
        (
            nn.Sequential(nn.LayerNorm(5)),
            ["0"],
            rows(4, 6, 3, 5),
            Refused,
            r"\[2, 6, 3, 5\] with its features on the last",
        ),
        (Table(), ["made"], rows(4, 6), Refused, r"\[5, 4\] for 2 rows: its first axis is not the batch"),
        (nn.Sequential(Children(), nn.Linear(4, 2)), ["0"], rows(4, 5), Refused, "'0' runs all of its children"),
        (nn.Sequential(nn.Identity()), ["0"], torch.ones(3, 6).long(), Refused, "layer '0' gives a tensor of int64"),
        (nn.Sequential(nn.Flatten(0)), ["0"], rows(4, 5), Refused, r"layer '0' gives the shape \[10\]"),
        (nn.Sequential(nn.ReLU(), Logarithm(5, 2)), ["0"], rows(40, 5), Refused, "outputs are not finite"),
        (nn.Sequential(nn.Identity()), ["0"], rows(4, 5) * 1e20, Refused, "variance is too large for float32"),
        (VGG(), [""], IMAGES, WrongCall, "'' is the whole network"),
        (VGG(), AFTER[:1], IMAGES[:0], WrongCall, "there are no rows"),
        (VGG(), AFTER[:1], IMAGES * torch.nan, Refused, "layer 'features.1' gives NaN or infinity"),
        (VGG(), AFTER[2:3], IMAGES[:1], Refused, "a single value in each channel"),
        (VGG(), AFTER[:1], rows(4, 5), Refused, "the network fails on these rows"),
        (nn.Sequential(nn.Embedding(9, 4)), ["0"], torch.ones(3, 6).long(), Refused, "features on the last axis"),
    ],
)
def test_where_batchnorm_cannot_stand(
    network: nn.Module, after: list[str], x: Tensor, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        insert(network.eval(), after, [x])


def test_as_many_rows_in_each_input() -> None:
    continuous, categorical = tabular_inputs()
    with pytest.raises(WrongCall, match="different numbers of rows"):
        insert(Tabular(), ["head"], [continuous, categorical[:3]])


@pytest.mark.parametrize("given", [{"eps": 0.0}, {"eps": float("nan")}, {"momentum": 0.0}, {"momentum": 1.5}])
def test_eps_and_momentum_have_a_range(given: dict[str, float]) -> None:
    with pytest.raises(WrongCall, match="must be above 0"):
        insert(VGG(), AFTER, [IMAGES], **given)  # type: ignore[arg-type]


def test_nothing_is_attached_where_something_cannot_be(inserted: Inserted) -> None:
    fresh = VGG()
    spec = inserted.specs["features.1"]
    with pytest.raises(WrongCall, match="no layer 'elsewhere'"):
        attach(fresh, {"features.1": spec, "elsewhere": spec})
    assert list(fresh.state_dict()) == list(VGG().state_dict())


def test_a_layer_gets_one_only(inserted: Inserted) -> None:
    with pytest.raises(WrongCall, match=r"'features.1' has a 'norm' already"):
        insert(inserted.module, ["features.1"], [IMAGES])
