"""Every manifest is what the platform it is for takes: checked against the schemas that the platforms publish.

Kubernetes: its OpenAPI definitions, strict, in `kubernetes-validate`. Compose: the specification's own schema, in
`check-jsonschema`. KServe: the fields of its Python SDK, in `kserve.schema.json`.
"""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from tests.deploy.manifests import (
    COMPOSE,
    DEPLOY,
    DEPLOYMENT,
    INFERENCE_SERVICE,
    KUBERNETES,
    RUNTIME,
    Document,
    documents,
)

KUBERNETES_VERSIONS = ("1.29", "1.37")
"""The oldest that is promised, and the newest whose schema is here."""

KINDS = {"InferenceService": "V1beta1InferenceService", "ServingRuntime": "V1alpha1ServingRuntime"}


def kserve_validator(kind: str) -> Draft202012Validator:
    schemas = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES_VERSIONS[-1]}.0-local-strict"
    core = Resource.from_contents(json.loads((schemas / "_definitions.json").read_text(encoding="utf-8")))
    own = json.loads((Path(__file__).parent / "kserve.schema.json").read_text(encoding="utf-8"))
    registry: Registry[Any] = core @ Registry()
    return Draft202012Validator({**own, "$ref": f"#/$defs/{KINDS[kind]}"}, registry=registry)


def check(document: Document, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def kubernetes_documents() -> list[Document]:
    manifests = (file for file in sorted(KUBERNETES.glob("*.yaml")) if file.name != "kustomization.yaml")
    return [document for file in manifests for document in documents(file)]


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("document", kubernetes_documents(), ids=lambda document: document["kind"])
def test_kubernetes_takes_each_of_them(document: Document, version: str) -> None:
    check(document, version)


def test_a_wrong_field_is_seen() -> None:
    wrong = copy.deepcopy(DEPLOYMENT)
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["paths"] = "/"
    with pytest.raises(ValidationError, match="paths"):
        check(wrong, KUBERNETES_VERSIONS[-1])


@pytest.mark.parametrize("document", [RUNTIME, INFERENCE_SERVICE], ids=lambda document: document["kind"])
def test_kserve_takes_each_of_them(document: Document) -> None:
    kserve_validator(document["kind"]).validate(document)


@pytest.mark.parametrize("wrong", ["containers.0.port", "containers.0.securityContext.readOnly", "protocolVersion"])
def test_a_wrong_field_of_kserve_is_seen(wrong: str) -> None:
    """Also in the parts that are Kubernetes' own."""
    document = copy.deepcopy(RUNTIME)
    *there, field = wrong.split(".")
    place: Any = document["spec"]
    for step in there:
        place = place[int(step) if step.isdecimal() else step]
    place[field] = True
    with pytest.raises(ValidationError, match=field):
        kserve_validator("ServingRuntime").validate(document)


def test_compose_takes_it() -> None:
    validator = Draft202012Validator(get_builtin_schema("vendor.compose-spec"))
    validator.validate(COMPOSE)
    with pytest.raises(ValidationError, match="readonly"):
        validator.validate({**COMPOSE, "services": {"evalmode": {"image": "evalmode", "readonly": True}}})


@pytest.mark.parametrize("folder", ["kubernetes", "kserve"])
def test_every_manifest_is_in_its_kustomization(folder: str) -> None:
    """But examples, which hold what must be made anew."""
    listed = documents(DEPLOY / folder / "kustomization.yaml")[0]["resources"]
    there = {file.name for file in (DEPLOY / folder).glob("*.yaml") if "example" not in file.name}
    assert sorted(listed) == sorted(there - {"kustomization.yaml"})
