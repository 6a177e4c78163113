"""What the manifests say of the service is so: its routes, settings, port, user, and how long it takes to end."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from service.app import create_app
from service.bodies import Bodies
from service.http_server import DRAIN_LIMIT_S
from service.repository import Repository
from service.runtime import place
from service.settings import Settings
from tests.deploy.manifests import (
    COMPOSE,
    CONTAINERS,
    DEPLOY,
    DEPLOYMENT,
    DOCKERFILE,
    INFERENCE_SERVICE,
    KSERVE,
    KUBERNETES,
    POD,
    PROBES,
    ROOT,
    RUNTIME,
    SCRAPED,
    Document,
    documents,
    environments,
    instruction,
    seconds,
    size_bytes,
    the,
)

PORT = 8000
USER = 10001
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
COMPOSED: Document = COMPOSE["services"]["evalmode"]
TEXTS = {
    file: file.read_text(encoding="utf-8") for file in sorted(DEPLOY.rglob("*")) if file.suffix in (".yaml", ".env")
}


def paths_that_answer() -> set[str]:
    empty = Repository([], path=Path(), placement=place("cpu"), settings=Settings())
    app = create_app(empty, Settings())._rest
    return {route.path for route in app.routes if isinstance(route, APIRoute)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("probe", PROBES)
def test_probes_ask_what_answers(probe: str) -> None:
    """Liveness asks the process, the others ask for a model: one whose models are gone is not killed for it."""
    asked = PROBES[probe]
    assert asked["path"] == ("/v2/health/live" if "liveness" in probe else "/v2/health/ready")
    assert asked["path"] in paths_that_answer()
    assert asked["port"] in ("http", PORT)


def test_prometheus_asks_the_same_everywhere() -> None:
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    kserve = RUNTIME["spec"]["annotations"]
    asked = {SCRAPED["metrics_path"], annotations["prometheus.io/path"], kserve["prometheus.kserve.io/path"]}
    assert asked == {"/metrics"}
    assert asked <= paths_that_answer()
    assert {annotations["prometheus.io/port"], kserve["prometheus.kserve.io/port"]} == {str(PORT)}
    assert SCRAPED["static_configs"] == [{"targets": [f"evalmode:{PORT}"]}]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(DEPLOY)))
def test_every_variable_is_a_setting(file: Path) -> None:
    known = {f"EVALMODE_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"EVALMODE_[A-Z_]*[A-Z]", TEXTS[file])) <= known


@pytest.mark.parametrize("manifest", environments())
def test_every_value_is_one_that_the_service_takes(manifest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = environments()[manifest]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    taken = Settings().model_dump(mode="json")
    for name, value in environment.items():
        assert float(taken[field(name)]) == float(value) if is_number(value) else taken[field(name)] == value, name


def field(variable: str) -> str:
    return variable.removeprefix("EVALMODE_").lower()


def is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9.]+", text) is not None


def test_every_flag_is_a_setting() -> None:
    arguments = CONTAINERS["kserve"]["args"]
    assert arguments[:2] == ["serve", "/mnt/models"]
    assert {argument.split("=")[0] for argument in arguments[2:]} == {"--name"}
    assert "name" in Settings.model_fields
    assert "args" not in CONTAINERS["kubernetes"]
    assert "command" not in CONTAINERS["kubernetes"] | COMPOSED


def test_the_port_is_the_images() -> None:
    assert instruction("EXPOSE") == str(PORT)
    assert f"EVALMODE_PORT={PORT}" in DOCKERFILE
    assert COMPOSED["ports"] == [f"127.0.0.1:${{PORT:-{PORT}}}:{PORT}"]
    for container in CONTAINERS.values():
        assert [port["containerPort"] for port in container["ports"]] == [PORT]
    (served,) = the(KUBERNETES / "service.yaml")["spec"]["ports"]
    assert (served["port"], served["targetPort"]) == (PORT, "http")
    (allowed,) = the(KUBERNETES / "network.yaml")["spec"]["ingress"]
    assert [port["port"] for port in allowed["ports"]] == ["http"]
    assert environments()["kserve"]["EVALMODE_PORT"] == str(PORT)


def test_a_service_of_our_name_does_not_become_a_setting() -> None:
    """Kubernetes would set EVALMODE_PORT=tcp://... for a Service named evalmode."""
    assert POD["enableServiceLinks"] is False
    assert INFERENCE_SERVICE["spec"]["predictor"]["enableServiceLinks"] is False


def test_the_user_is_the_images() -> None:
    assert instruction("USER") == f"{USER}:{USER}" == COMPOSED["user"]
    for context in (POD["securityContext"], CONTAINERS["kserve"]["securityContext"]):
        assert (context["runAsUser"], context["runAsGroup"], context["runAsNonRoot"]) == (USER, USER, True)


@pytest.mark.parametrize("manifest", CONTAINERS)
def test_the_restricted_profile_is_met(manifest: str) -> None:
    """As https://kubernetes.io/docs/concepts/security/pod-security-standards/ has it; and a root that is read-only."""
    context = {
        **(POD["securityContext"] if manifest == "kubernetes" else {}),
        **CONTAINERS[manifest]["securityContext"],
    }
    assert context["runAsNonRoot"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["readOnlyRootFilesystem"] is True
    kinds = {kind for volume in POD["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_compose_gives_no_more_than_is_needed(service: str) -> None:
    of_it = COMPOSE["services"][service]
    assert of_it["read_only"] is True
    assert of_it["cap_drop"] == ["ALL"]
    assert of_it["security_opt"] == ["no-new-privileges:true"]
    assert not of_it["user"].startswith("0")
    assert size_bytes(of_it["mem_limit"])
    assert of_it["cpus"]
    assert all(published.startswith("127.0.0.1:") for published in of_it["ports"])


def test_models_and_keys_are_read_only() -> None:
    models, keys = COMPOSED["volumes"]
    assert (models["target"], models["read_only"]) == ("/models", True)
    assert keys["read_only"]
    assert COMPOSED["environment"]["EVALMODE_KEYS_FILE"] == f"{keys['target']}/keys"  # a file alone never changes
    assert "EVALMODE_MODELS=/models" in DOCKERFILE
    mounts = {mount["name"]: mount for mount in CONTAINERS["kubernetes"]["volumeMounts"]}
    assert mounts["models"]["mountPath"] == "/models"
    assert mounts["models"]["readOnly"]
    assert mounts["keys"]["readOnly"]
    (claim,) = [volume["persistentVolumeClaim"] for volume in POD["volumes"] if volume["name"] == "models"]
    assert claim == {"claimName": the(KUBERNETES / "models.yaml")["metadata"]["name"], "readOnly": True}


def test_compose_checks_health_as_the_image_does() -> None:
    said = instruction("HEALTHCHECK").partition("CMD ")[2]
    assert ["CMD", *json.loads(said)] == COMPOSED["healthcheck"]["test"]
    assert "/v2/health/ready" in said


GRACE_S = {
    "compose": seconds(COMPOSED["stop_grace_period"]),
    "kubernetes": POD["terminationGracePeriodSeconds"],
    "kserve": INFERENCE_SERVICE["spec"]["predictor"]["terminationGracePeriodSeconds"],
}


@pytest.mark.parametrize("manifest", GRACE_S)
def test_the_end_is_waited_for(manifest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait after SIGTERM, the drain at its longest, and a margin; whoever waits for an answer has it by then."""
    for name, value in environments()[manifest].items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert GRACE_S[manifest] >= settings.shutdown_delay_s + DRAIN_LIMIT_S + 5
    assert 0 < settings.timeout_s <= DRAIN_LIMIT_S


@pytest.mark.parametrize("manifest", environments())
def test_what_may_wait_fits_beside_the_model(manifest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requested memory, the queue at its fullest, all that may be half read, as much of answers and one body stay under
    the limit."""
    for name, value in environments()[manifest].items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    if manifest == "compose":
        requested, limit = 256 * 2**20, size_bytes(COMPOSED["mem_limit"])
    else:
        resources = CONTAINERS[manifest]["resources"]
        requested, limit = (size_bytes(resources[kind]["memory"]) for kind in ("requests", "limits"))
    bodies = Bodies(max_bytes=settings.max_reading_bytes, body_limit_bytes=settings.body_limit_bytes)
    waiting = settings.max_queue_bytes + 2 * bodies.max_bytes + settings.body_limit_bytes
    assert requested + settings.workers * waiting <= limit


def test_kubernetes_objects_mean_each_other() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    selectors = [
        the(KUBERNETES / "service.yaml")["spec"]["selector"],
        the(KUBERNETES / "disruption.yaml")["spec"]["selector"]["matchLabels"],
        the(KUBERNETES / "network.yaml")["spec"]["podSelector"]["matchLabels"],
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in POD["topologySpreadConstraints"]),
    ]
    assert all(selector == labels for selector in selectors)
    scaler = the(KUBERNETES / "autoscaler.yaml")["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "evalmode"}
    assert scaler["minReplicas"] > the(KUBERNETES / "disruption.yaml")["spec"]["maxUnavailable"]
    assert "replicas" not in DEPLOYMENT["spec"]
    kustomization = the(KUBERNETES / "kustomization.yaml")
    assert CONTAINERS["kubernetes"]["envFrom"] == [
        {"configMapRef": {"name": kustomization["configMapGenerator"][0]["name"]}}
    ]
    secrets = [volume["secret"]["secretName"] for volume in POD["volumes"] if "secret" in volume]
    assert secrets == [the(KUBERNETES / "keys.example.yaml")["metadata"]["name"]]


def test_the_inference_service_asks_for_the_runtime() -> None:
    model = INFERENCE_SERVICE["spec"]["predictor"]["model"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert model["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
    assert model["modelFormat"]["name"] in [kind["name"] for kind in RUNTIME["spec"]["supportedModelFormats"]]
    assert model["storageUri"].startswith(f"pvc://{the(KUBERNETES / 'models.yaml')['metadata']['name']}/")


def test_the_image_is_of_this_version() -> None:
    (image,) = the(KUBERNETES / "kustomization.yaml")["images"]
    assert image["name"] == CONTAINERS["kubernetes"]["image"]
    assert f"{image['newName']}:{image['newTag']}" == CONTAINERS["kserve"]["image"]
    assert image["newTag"] == VERSION
    assert all(len(documents(file)) == 1 for folder in (KUBERNETES, KSERVE) for file in folder.glob("*.yaml"))
