"""What lies in deploy/, read: each document of each manifest, and what of it the tests ask for."""

from __future__ import annotations

import re
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

SCRAPED: Document = yaml.safe_load(COMPOSE["configs"]["prometheus"]["content"])["scrape_configs"][0]
"""How the Prometheus of compose.yaml asks."""


def instruction(name: str) -> str:
    """What the Dockerfile's last instruction of this name says."""
    found: list[str] = re.findall(rf"^{name} (.+?)(?<!\\)$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    return found[-1]
