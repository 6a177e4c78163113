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
from tests.export.zoo import rows

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


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.linear(self.linear(x))
        return answer


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


def test_a_layer_gets_one_only(inserted: Inserted) -> None:
    with pytest.raises(WrongCall, match=r"'features.1' has a 'norm' already"):
        insert(inserted.module, ["features.1"], [IMAGES])
