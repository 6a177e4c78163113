"""What watches the service loads whole, and asks only for what the service says at /metrics."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.bundles import SAMPLE, write_table_bundle
from tests.conftest import Serve
from tests.deploy.manifests import (
    ALERTS,
    COMPOSE,
    DASHBOARD,
    DEPLOY,
    as_asked,
    configured_prometheus,
    mounted,
    the,
)

PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
VARIABLES: dict[str, dict[str, Any]] = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]

ADDED = {"job", "instance"}
"""Labels that Prometheus gives to whatever it scrapes."""
ITS_OWN = {"up": ADDED}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus"
)


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_the_prometheus_of_compose_loads_every_alert(tmp_path: Path) -> None:
    """Its configuration, as it lies in its container, is one that Prometheus takes."""
    said = promtool("check", "config", configured_prometheus(tmp_path, key="any"))
    assert "SUCCESS: 1 rule files found" in said
    assert f"SUCCESS: {len(ALERTS)} rules found" in said
    assert len(ALERTS) == 12


def test_everything_that_watches_is_mounted() -> None:
    """Each file of its own is in a container of compose.yaml, but the tests of the rules."""
    there = {
        f"./{file.relative_to(DEPLOY)}" for folder in ("prometheus", "grafana") for file in (DEPLOY / folder).iterdir()
    }
    assert {config["file"] for config in COMPOSE["configs"].values()} == there - {"./prometheus/rules_test.yml"}
    used = [config["source"] for service in COMPOSE["services"].values() for config in service.get("configs", [])]
    assert sorted(used) == sorted(COMPOSE["configs"])


def test_grafana_finds_its_dashboard_and_its_prometheus(tmp_path: Path) -> None:
    """What is provisioned names places that are there, and only who asks for the profile has a Grafana."""
    grafana = COMPOSE["services"]["grafana"]
    assert grafana["profiles"] == ["grafana"]
    assert not any("profiles" in COMPOSE["services"][always] for always in ("evalmode", "prometheus"))
    root = mounted("grafana", tmp_path)
    (provider,) = the(root / "etc/grafana/provisioning/dashboards/evalmode.yaml")["providers"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert json.loads((root / home.lstrip("/")).read_text()) == DASHBOARD
    assert Path(home).parent == Path(provider["options"]["path"])
    (source,) = the(root / "etc/grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    (port,) = COMPOSE["services"]["prometheus"]["ports"]
    assert source["url"] == f"http://prometheus:{port.rpartition(':')[2]}"
    assert source["type"] == VARIABLES["datasource"]["query"] == "prometheus"


def test_the_dashboard_has_the_shape_that_grafana_takes() -> None:
    """As https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/ has it."""
    assert DASHBOARD["schemaVersion"] >= 39
    assert DASHBOARD["uid"]
    assert DASHBOARD["title"]
    assert list(VARIABLES) == ["datasource", "instance", "model"]
    assert VARIABLES["datasource"]["type"] == "datasource"
    from_the_variable = {"type": "prometheus", "uid": "${datasource}"}
    assert all(
        variable["datasource"] == from_the_variable for name, variable in VARIABLES.items() if name != "datasource"
    )
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    cells: list[tuple[int, int]] = []
    for panel in PANELS:
        assert panel["datasource"] == from_the_variable
        assert panel["description"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        assert x + w <= 24
        cells += itertools.product(range(x, x + w), range(y, y + h))
    assert len(set(cells)) == len(cells), "two panels lie over each other"


@needs_promtool
def test_every_query_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    rules = [{"record": f"query:{i}", "expr": as_asked(target["expr"])} for i, (_, target) in enumerate(TARGETS)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"SUCCESS: {len(TARGETS)} rules found" in promtool("check", "rules", tmp_path / "rules.yml")


WORDS = {"and", "or", "unless", "bool", "offset"}
GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)(?![\w:]|\s*\()\s*(?:\{([^}]*)\})?")


def metrics_asked_for(expression: str) -> list[tuple[str, set[str]]]:
    """Each metric in it, with the labels that pick from it."""
    bare = re.sub(r"\[[^\]]*\]", "", re.sub(r'"[^"]*"', '""', GROUPING.sub("", expression)))
    found = [(name, set(re.findall(r"(\w+)\s*(?:=|!)", picked))) for name, picked in SELECTOR.findall(bare)]
    return [(name, labels) for name, labels in found if name not in WORDS]


def grouped_by(expression: str) -> set[str]:
    return {label.strip() for labels in GROUPING.findall(expression) for label in labels.split(",")}


def test_what_an_expression_asks_for_is_read() -> None:
    """The reader of the test below does see it all."""
    expression = 'sum by (a, le) (rate(x_bucket{b=~"c{", d!="e"}[5m])) / 2 > up unless on (f) y_total'
    assert metrics_asked_for(expression) == [("x_bucket", {"b", "d"}), ("up", set()), ("y_total", set())]
    assert grouped_by(expression) == {"a", "le", "f"}


@pytest.mark.e2e
def test_every_metric_and_label_is_one_that_the_service_says(serve: Serve, tmp_path: Path) -> None:
    """In the alerts, the dashboard's queries, its legends and its variables; two workers, one request refused."""
    write_table_bundle(tmp_path, name="table")
    serving = serve(tmp_path, "--workers", "2")
    assert httpx.post(f"{serving.address}/predict", json=SAMPLE, timeout=20).status_code == 200
    assert httpx.post(f"{serving.address}/predict", json={}, timeout=20).status_code == 400
    said: dict[str, set[str]] = dict(ITS_OWN)
    for family in text_string_to_metric_families(httpx.get(f"{serving.address}/metrics", timeout=20).text):
        for sample in family.samples:
            said.setdefault(sample.name, set(ADDED)).update(sample.labels)

    shown = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")
    queries = [(alert["expr"], shown.findall(alert["annotations"]["summary"])) for alert in ALERTS]
    queries += [(target["expr"], shown.findall(target.get("legendFormat", ""))) for _, target in TARGETS]
    for expression, labels_shown in queries:
        of_all: set[str] = set()
        for metric, labels in metrics_asked_for(expression):
            assert metric in said, f"nothing is called {metric}: {expression}"
            assert labels <= said[metric], f"{metric} has no label {labels - said[metric]}: {expression}"
            of_all |= said[metric]
        assert grouped_by(expression) <= of_all, expression
        assert set(labels_shown) <= (grouped_by(expression) or of_all), (expression, labels_shown)
    for name in ("instance", "model"):
        (found,) = re.findall(r"label_values\((\w+), (\w+)\)", VARIABLES[name]["query"]["query"])
        assert found[1] in said[found[0]]
