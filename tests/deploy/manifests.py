"""What lies in deploy/, read: each document of each manifest, and what of it the tests ask for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
KSERVE = DEPLOY / "kserve"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")

Document = dict[str, Any]


def documents(file: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(file.read_text(encoding="utf-8")) if document]


def the(file: Path) -> Document:
    (document,) = documents(file)
    return document


COMPOSE = the(DEPLOY / "compose.yaml")
DEPLOYMENT = the(KUBERNETES / "deployment.yaml")
RUNTIME = the(KSERVE / "runtime.yaml")
INFERENCE_SERVICE = the(KSERVE / "inference-service.yaml")

POD: Document = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINERS: dict[str, Document] = {"kubernetes": POD["containers"][0], "kserve": RUNTIME["spec"]["containers"][0]}


def settings_env() -> dict[str, str]:
    """What the ConfigMap is made of."""
    lines = (KUBERNETES / "settings.env").read_text(encoding="utf-8").split()
    return dict(line.split("=", 1) for line in lines)


def environments() -> dict[str, dict[str, str]]:
    """The variables of the service, by manifest."""
    return {
        "compose": COMPOSE["services"]["evalmode"]["environment"],
        "kubernetes": settings_env(),
        "kserve": {variable["name"]: variable["value"] for variable in CONTAINERS["kserve"]["env"]},
    }


def size_bytes(quantity: str) -> int:
    """`256Mi` of Kubernetes and `512m` of Compose, in bytes."""
    number, unit = re.fullmatch(r"(\d+)(m|Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"m": 2**20, "Mi": 2**20, "Gi": 2**30}[unit]


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


PROBES: dict[str, Document] = {
    f"{manifest} {probe}": container[probe]["httpGet"]
    for manifest, container in CONTAINERS.items()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe")
}
"""What each probe asks for."""

PROMETHEUS = the(DEPLOY / "prometheus" / "prometheus.yml")
SCRAPED: Document = PROMETHEUS["scrape_configs"][0]
"""How the Prometheus of compose.yaml asks."""

ALERTS: list[Document] = the(DEPLOY / "prometheus" / "rules.yml")["groups"][0]["rules"]
DASHBOARD: Document = json.loads((DEPLOY / "grafana" / "evalmode.json").read_text(encoding="utf-8"))


def as_asked(query: str) -> str:
    """What Grafana makes of a query of the dashboard: its variables have values."""
    return re.sub(r"\$(instance|model)\b", ".+", query.replace("$__rate_interval", "1m"))


def mounted(service: str, folder: Path) -> Path:
    """Copy below a folder what Compose mounts into a service's container, secrets aside; the folder."""
    for config in COMPOSE["services"][service]["configs"]:
        there = folder / config["target"].lstrip("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DEPLOY / COMPOSE["configs"][config["source"]]["file"], there)
    return folder


def configured_prometheus(folder: Path, *, key: str) -> Path:
    """The configuration of the Prometheus of compose.yaml, with its rules beside it, and a key that it can read."""
    flags: list[str] = COMPOSE["services"]["prometheus"]["command"]
    (there,) = [flag.removeprefix("--config.file=/") for flag in flags if flag.startswith("--config.file=/")]
    configuration = mounted("prometheus", folder) / there
    secrets = folder / "run" / "secrets"
    secrets.mkdir(parents=True)
    (secrets / "metrics_key").write_text(f"{key}\n")
    configuration.write_text(configuration.read_text().replace("/run/secrets", str(secrets)))
    return configuration


def instruction(name: str) -> str:
    """What the Dockerfile's last instruction of this name says."""
    found: list[str] = re.findall(rf"^{name} (.+?)(?<!\\)$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    return found[-1]
