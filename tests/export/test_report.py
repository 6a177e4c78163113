"""`report.html`: one file that says first whether the model is served as evaluated, and draws the layers."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from export.audit import Finding
from export.exporting import export_model
from export.gap import measured_gap
from export.report import MOST_LINES, render
from export.subject import Data
from service.bundle import Passport
from service.graph.fold import Fold
from tests.export.zoo import rows, settled

X = rows(40, 5)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return settled(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 300), nn.BatchNorm1d(300), nn.Linear(300, 3)), X)


@pytest.fixture(scope="module")
def passport(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Passport:
    exported = export_model(
        network, [X], name="net", models=tmp_path_factory.mktemp("models"), card="For <b>tests</b>."
    )
    return exported.passport


FOLDS = (
    Fold(layer="0", into=None, side=None, kept_because="rounding would grow & grow"),
    Fold(layer="2", into="1", side="before", kept_because=None),
)
WARNING = Finding(rule="BN010", severity="warning", layer="2", message="momentum 0.99 <is> Keras's")


def page(passport: Passport, network: nn.Module, **changes: object) -> str:
    layers = {layer.layer: network.get_submodule(layer.layer) for layer in passport.batchnorm}
    said = {"folds": FOLDS, "findings": (), "gap": None, **changes}
    return render(passport, layers=layers, **said)  # type: ignore[arg-type]


class Tags(HTMLParser):
    """Every opened tag must be closed, and nothing may be fetched."""

    VOID = frozenset({"meta", "br", "hr", "img", "line", "path", "input", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            str(value) for name, value in attrs if name in ("src", "href") and not str(value).startswith("#")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def read(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    return tags


def test_the_verdict_comes_first_with_its_figures(passport: Passport, network: nn.Module) -> None:
    html = page(passport, network)
    texts = [text for text in read(html).texts if text]
    said = " ".join(texts)
    assert said.index("net/1 is served as it was evaluated") < said.index("BatchNorm layers are frozen")
    assert "where the rounding of this network explains up to" in said
    assert "tried in batches of 1, 2, 3, 7, 64" in said
    assert "In train mode 'output' would be off by up to" in said
    assert "with a warning" not in said


def test_it_is_one_file_that_fetches_nothing(passport: Passport, network: nn.Module) -> None:
    """No script, font or picture from elsewhere; the policy in its head would not let one in."""
    html = page(passport, network)
    assert read(html).fetched == []
    assert "<script" not in html
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\(", html)


def test_what_comes_from_outside_is_text(passport: Passport, network: nn.Module) -> None:
    """A card, a finding or a reason cannot become markup."""
    html = page(passport, network, findings=(WARNING,))
    assert "For <b>tests" not in html
    assert "For &lt;b&gt;tests&lt;/b&gt;." in html
    assert "momentum 0.99 &lt;is&gt;" in html
    assert "kept: rounding would grow &amp; grow" in html


def test_layers_are_drawn_and_not_listed(passport: Passport, network: nn.Module) -> None:
    """A line for each channel; many channels by their quantiles; all on one axis, inside it."""
    html = page(passport, network)
    paths = re.findall(r'<path d="([^"]*)"', html)
    assert [path.count("M") for path in paths] == [5, 5, 5, MOST_LINES, MOST_LINES, MOST_LINES]
    positions = [float(number) for path in paths for number in re.findall(r"M([\d.-]+) ", path)]
    assert min(positions) >= 0
    assert max(positions) <= 100
    assert html.count('class="strip" role="img" aria-label=') == 6
    assert "folded into <code>1</code>" in html


def test_warnings_and_the_gap_change_the_verdict(passport: Passport, network: nn.Module) -> None:
    html = page(passport, network, findings=(WARNING,))
    assert "as it was evaluated, with a warning" in html
    assert "The audit warns of one thing" in html
    data = Data(inputs=(X * 2,), targets=torch.zeros(40, dtype=torch.long), source="here")
    html = page(passport, network, gap=measured_gap(network, data))
    assert "as it was evaluated, with a warning" in html
    assert "The gap between training and evaluation: drifted" in html
    for column in ("accuracy", "log loss", "of each batch", "de-biased", "of all rows"):
        assert column in html


@pytest.mark.parametrize("spoil", ["no BatchNorm", "one channel", "a dead channel"])
def test_odd_networks_have_a_page(spoil: str, tmp_path: Path) -> None:
    made: dict[str, nn.Module] = {
        "no BatchNorm": nn.Sequential(nn.Linear(5, 3)),
        "one channel": nn.Sequential(nn.Linear(5, 1), nn.BatchNorm1d(1)),
        "a dead channel": nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)),
    }
    network = settled(made[spoil], X)
    if spoil == "a dead channel":
        network.get_buffer("0.running_var")[1] = 0.0
        network.get_parameter("0.weight").data[1] = 0.0
    html = export_model(network, [X], name="net", models=tmp_path).report.read_text(encoding="utf-8")
    read(html)
    assert "nan" not in re.sub(r"sha256 \w+", "", html).lower().replace("finance", "")
    assert "net/1 is served as it was evaluated" in html
