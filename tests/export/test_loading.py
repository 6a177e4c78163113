"""The user's own network: what builds it and what its file may look like; what does not fit is named."""

from __future__ import annotations

import collections
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from export.loading import build, built, load, read_state, write_state
from service.errors import WrongCall

State = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self, width: int = 4, *, norm: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norm(self.linear(x))
        return answer


SHARED = Net()


def fails() -> nn.Module:
    raise RuntimeError("no such config")


def gives_a_list() -> list[int]:
    return [1]


HERE = f"{__name__}:"


def trained() -> Net:
    torch.manual_seed(3)
    net = Net()
    net(torch.randn(40, 3) * 2 + 5)
    return net


def averaged(net: Net) -> State:
    model = torch.optim.swa_utils.AveragedModel(net)
    return dict(model.state_dict())


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """This module under a name that can be imported, whatever pytest calls it."""
    import sys

    monkeypatch.setitem(sys.modules, "nets_under_test", sys.modules[__name__])
    return "nets_under_test:"


# The network


def test_a_callable_with_its_settings(here: str) -> None:
    """JSON where it can be read as JSON."""
    net = build(f"{here}Net", ["width=7", "norm=false"])
    assert isinstance(net, Net)
    assert net.linear.out_features == 7
    assert isinstance(net.norm, nn.Identity)


def test_a_network_that_is_there_already_is_copied(here: str) -> None:
    """Loading weights must not change the user's own object."""
    net = build(f"{here}SHARED")
    assert isinstance(net, Net)
    assert net is not SHARED
    assert torch.equal(net.linear.weight, SHARED.linear.weight)


@pytest.mark.parametrize(
    ("target", "settings", "sentence"),
    [
        ("no_such_package.nets:build", (), "'no_such_package.nets' cannot be imported: ModuleNotFoundError.*folder"),
        ("nets_under_test:Nett", (), "has no 'Nett'; did you mean 'Net'"),
        ("nets_under_test:Net", ("wide=3",), r"takes \(width: .*unexpected keyword argument 'wide'; --set key=value"),
        ("nets_under_test:Net", ("width",), "--set width is not key=value"),
        ("nets_under_test:fails", (), "'nets_under_test:fails' failed: RuntimeError: no such config"),
        ("nets_under_test:gives_a_list", (), "gave a list; it must return a torch.nn.Module"),
        ("nets_under_test:HERE", (), "is a str; name a function or class"),
        ("nets_under_test:SHARED", ("width=3",), "is a network already"),
    ],
)
def test_what_builds_no_network(here: str, target: str, settings: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(WrongCall, match=sentence):
        build(target, settings)


# The file

WRAPPINGS: dict[str, Callable[[Net], Any]] = {
    "bare": lambda net: net.state_dict(),
    "state_dict": lambda net: {"epoch": 3, "state_dict": net.state_dict(), "optimizer": {"lr": 0.1}},
    "model": lambda net: {"model": net.state_dict(), "ema": copy.deepcopy(net).state_dict()},
    "nested": lambda net: {"model": {"state_dict": net.state_dict()}},
    "DataParallel": lambda net: prefixed("module.", dict(net.state_dict())),
    "compiled": lambda net: prefixed("_orig_mod.", dict(net.state_dict())),
    "Lightning": lambda net: {"state_dict": prefixed("model.", dict(net.state_dict())), "callbacks": {}},
    "averaged": averaged,
    "before counting": lambda net: {k: v for k, v in net.state_dict().items() if "num_batches" not in k},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_common_wrappings_are_opened(wrapping: str, tmp_path: Path) -> None:
    """Every tensor arrives, and what was done is said."""
    net = trained()
    torch.save(WRAPPINGS[wrapping](net), tmp_path / "net.pt")
    fresh = Net()
    notes = load(fresh, read_state(tmp_path / "net.pt"))
    for key, value in net.state_dict().items():
        if "num_batches" not in key:
            assert torch.equal(fresh.state_dict()[key], value), key
    assert bool(notes) == (wrapping != "bare")


def test_averaged_weights_are_said_to_be_so(tmp_path: Path) -> None:
    torch.save(averaged(trained()), tmp_path / "net.pt")
    assert any("averaged weights" in note for note in load(Net(), read_state(tmp_path / "net.pt")))


def test_safetensors_with_what_its_header_says(tmp_path: Path) -> None:
    """Written whole, never over a file that is there."""
    net = trained()
    write_state(tmp_path / "net.safetensors", net.state_dict(), {"evalmode.settled": ["norm"]})
    state = read_state(tmp_path / "net.safetensors")
    assert state.settled == {"norm"}
    assert load(Net(), state) == ()
    with pytest.raises(WrongCall, match="already there"):
        write_state(tmp_path / "net.safetensors", net.state_dict(), {})
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def without(state: State, *keys: str) -> State:
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda s: without(s, "norm.running_mean", "norm.running_var"),
            r"lacks running statistics, 'norm.running_mean'",
        ),
        (lambda s: without(s, "linear.bias"), r"it lacks 'linear.bias'$"),
        (lambda s: {**s, "head.weight": torch.ones(1)}, r"the network has no 'head.weight'$"),
        (lambda s: {**prefixed("model.", s), "loss.weight": torch.ones(1)}, r"the network has no 'loss.weight'$"),
        (lambda s: {**s, "linear.weight": torch.ones(4, 5)}, r"'linear.weight' has shape \[4, 5\]; .* \[4, 3\]"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    spoil: Callable[[State], State], sentence: str, tmp_path: Path
) -> None:
    """load_state_dict(strict=False) would leave mean 0 and variance 1."""
    torch.save(spoil(dict(trained().state_dict())), tmp_path / "net.pt")
    fresh = Net()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(WrongCall, match=sentence):
        load(fresh, read_state(tmp_path / "net.pt"))
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def write_pickled_network(file: Path) -> None:
    torch.save(trained(), file)


def write_optimizer(file: Path) -> None:
    torch.save({"lr": 0.1, "betas": [0.9, 0.99]}, file)


def write_noise(file: Path) -> None:
    file.write_bytes(b"\x00\x01 not a file of PyTorch")


def write_cut(file: Path) -> None:
    torch.save(trained().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (write_pickled_network, r"a pickle that holds more than tensors \(.*Net\).*save the weights alone"),
        (write_optimizer, r"has no weights in it \(a dictionary of 'lr', 'betas'\)"),
        (write_noise, "holds no weights that PyTorch can read"),
        (write_cut, "holds no weights that PyTorch can read"),
        (lambda file: None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_file_with_weights(write: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    """The reason, and the way out."""
    write(tmp_path / "net.pt")
    with pytest.raises(WrongCall, match=sentence) as refusal:
        read_state(tmp_path / "net.pt")
    assert not re.search(r"weights_only|\x1b", str(refusal.value))


def test_a_broken_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(safetensors.torch.save({"a": torch.ones(9)})[:-4])
    with pytest.raises(WrongCall, match="is no safetensors file"):
        read_state(tmp_path / "net.safetensors")


def test_built_is_the_network_with_its_weights(here: str, tmp_path: Path) -> None:
    net = trained()
    torch.save(collections.OrderedDict(net.state_dict()), tmp_path / "net.pt")
    found = built(f"{here}Net", weights=tmp_path / "net.pt")
    assert found.module.training  # in the mode in which the builder returned it
    assert torch.equal(found.module.get_buffer("norm.running_var"), net.get_buffer("norm.running_var"))
