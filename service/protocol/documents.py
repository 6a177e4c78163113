"""What the Open Inference Protocol says about a model: metadata, configuration, and under `evalmode` what only this
server knows.

Source of the configuration: triton-inference-server, `docs/protocol/extension_model_configuration.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service.repository import Live
from service.runtime import CUDA_PROVIDER
from service.signature import TensorSpec

PLATFORM = "onnx_onnxv1"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")

Document = dict[str, object]


def metadata(live: Live, versions: Sequence[str], aliases: Mapping[str, str]) -> Document:
    """The answer of `GET /v2/models/{m}`.

    Args:
        versions: of this model, those that are live.
        aliases: what else they are called.
    """
    admitted = live.admitted
    passport = admitted.bundle.passport
    batching = live.batching
    return {
        "name": live.name,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": [spec.model_dump() for spec in admitted.signature.inputs],
        "outputs": [spec.model_dump() for spec in admitted.signature.outputs],
        "evalmode": {
            "version": live.version,
            "aliases": dict(aliases),
            "provider": admitted.runtime.provider,
            "threads": admitted.runtime.threads,
            "batchnorm_layers": len(admitted.batchnorms),
            "folded": {found.layer: found.into for found in admitted.folds if found.into},
            "kept": {found.layer: found.kept_because for found in admitted.folds if not found.into},
            "golden": {
                "rows": admitted.golden_rows,
                "differences": {figure.name: figure.difference for figure in admitted.golden},
                "tolerances": {figure.name: figure.bound for figure in admitted.golden},
            }
            if admitted.golden
            else None,
            "independence": batching.independence.model_dump(),
            "max_batch_rows": batching.max_rows,
            "inline_rows": batching.inline_rows,
            "run_ms": {rows: round(run_s * 1e3, 4) for rows, run_s in batching.run_s.items()},
            "features": [feature.model_dump() for feature in admitted.signature.features]
            if admitted.signature.features is not None
            else None,
            "target": admitted.signature.target.model_dump() if admitted.signature.target else None,
            "card": passport.card if passport else None,
        },
    }


def config(live: Live, versions: Sequence[str]) -> Document:
    """The answer of `GET /v2/models/{m}/config`: as much of Triton's ModelConfig as there is here.

    `max_batch_size` is 0 unless the batch axis is free, and where it is not 0 the dims leave that axis out.
    """
    signature = live.admitted.signature
    free = all(spec.shape[0] == -1 for spec in (*signature.inputs, *signature.outputs))
    return {
        "name": live.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": live.batching.max_rows if free else 0,
        "input": _ports(signature.inputs, free=free),
        "output": _ports(signature.outputs, free=free),
        "instance_group": [
            {
                "name": live.name,
                "kind": "KIND_GPU" if live.admitted.runtime.provider == CUDA_PROVIDER else "KIND_CPU",
                "count": 1,
            }
        ],
        "version_policy": {"specific": {"versions": list(versions)}},
    }


def _ports(specs: Sequence[TensorSpec], *, free: bool) -> list[Document]:
    return [
        {
            "name": spec.name,
            "data_type": "TYPE_" + {"BYTES": "STRING"}.get(spec.datatype, spec.datatype),
            "dims": list(spec.shape[1:] if free else spec.shape),
        }
        for spec in specs
    ]
