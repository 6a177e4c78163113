"""What `evalmode serve` prints: what became of each version, and how to call the service."""

from __future__ import annotations

import shlex

import orjson

from service.numerics import made_up_rows
from service.openapi import infer_example
from service.places import Found
from service.protocol.v2 import BINARY_OUTPUTS, BINARY_SIZE
from service.repository import Entry, Live, Repository
from service.settings import Settings, is_loopback
from service.stdout import say


def tell_begun(found: Found, settings: Settings) -> None:
    """A version, before it is loaded: of a large one nothing more is heard for long, and nothing answers until then."""
    path = found.path
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size_mb = sum(file.stat().st_size for file in files) / 1e6
    say(f"  {found.name}/{found.version}  loading {size_mb:.1f} MB, for at most {settings.admission_limit_s:.0f} s")


def tell(entry: Entry) -> None:
    """A version, as soon as it is decided."""
    if entry.live is None:
        say(f"  {entry.name}/{entry.version}  REFUSED  {entry.reason}")
        return
    live = entry.live
    admitted = live.admitted
    golden = "; ".join(
        f"{admitted.golden_rows} golden samples replayed, {figure.name} within {figure.difference:.2g} of PyTorch "
        f"({figure.bound:.2g} allowed)"
        for figure in admitted.golden
    )
    bound = f" up to {live.batching.independence.bound:.2g}" if live.batching.independence.kind == "bounded" else ""
    say(f"  {entry.name}/{entry.version}  ready")
    folded = sum(1 for fold in admitted.folds if fold.into)
    say(f"    structure     {len(admitted.batchnorms)} BatchNorm layers, all frozen, {folded} of them folded")
    say(f"    digest        {'as the passport says' if admitted.bundle.passport else 'no passport: a plain ONNX file'}")
    say(f"    golden        {golden or 'no golden samples: equality with PyTorch is not known'}")
    sizes = live.batching.independence.batch_sizes
    tried = f"every size up to {sizes[-1]}" if len(sizes) > 1 else f"batches of {sizes[0]}"
    open_ended = any(-1 in spec.shape[1:] for spec in admitted.signature.inputs)
    where = ", for rows as long as those tried; requests do not share batches" if open_ended else ""
    say(f"    independence  {live.batching.independence.kind}{bound}, in {tried}{where}")


def announcement(repository: Repository, host: str, port: int, settings: Settings) -> str:
    """Addresses, and a call that works as printed."""
    local = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    address = f"{'https' if settings.tls_certificate else 'http'}://{local}:{port}"
    several = f"\nworkers       {settings.workers}" if settings.workers > 1 else ""
    keys = "\nAPI keys      needed; 'evalmode key' makes one" if settings.keys_file else ""
    if not settings.keys_file and not is_loopback(host):
        keys = "\nAPI keys      none, so everybody who reaches the port may predict; see --keys-file"
    return f"""
serving at    {address}
API docs      {address}/docs{several}{keys}

Try it:

{_call(repository, _Curl(address, settings))}
"""


LONGEST_CALL = 2000
"""Characters of a call that people can still read; a larger one sends zeros in binary."""


class _Curl:
    """The beginning of a call; the certificate is for another name than the one that is called here."""

    def __init__(self, address: str, settings: Settings) -> None:
        self._address = address
        self._flags = " --insecure" if settings.tls_certificate else ""
        if settings.keys_file:
            self._flags += ' -H "Authorization: Bearer $KEY"'

    def to(self, path: str) -> str:
        return f"curl {self._address}{path}{self._flags}"


def _call(repository: Repository, curl: _Curl) -> str:
    if not repository.models:
        return f"no model answers by its name alone; {curl.to('/v2/repository/index')} -X POST says why"
    live = next((live for live in repository.models if live.reader is not None), repository.models[0])
    if live.reader is not None:
        path = "/predict" if len(repository.models) == 1 else f"/models/{live.name}/predict"
        body = orjson.dumps(live.admitted.signature.example()).decode()
    else:
        path = f"/v2/models/{live.name}/infer"
        signature = live.admitted.signature
        if any(spec.datatype == "FP16" for spec in (*signature.inputs, *signature.outputs)):
            return _binary_call(live, curl.to(path))
        body = orjson.dumps(infer_example(live)).decode()
        if len(body) > LONGEST_CALL and all(spec.datatype != "BYTES" for spec in live.admitted.signature.inputs):
            return _binary_call(live, curl.to(path))
    return f"{curl.to(path)} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _binary_call(live: Live, call: str) -> str:
    """One row of zeros, in binary, for a shell of any kind."""
    signature = live.admitted.signature
    rows = made_up_rows(signature.inputs, count=1)
    size = sum(row.nbytes for row in rows)
    request: dict[str, object] = {
        "inputs": [
            {
                "name": spec.name,
                "shape": row.shape,
                "datatype": spec.datatype,
                "parameters": {BINARY_SIZE: row.nbytes},
            }
            for spec, row in zip(signature.inputs, rows, strict=True)
        ]
    }
    if any(spec.datatype == "FP16" for spec in signature.outputs):
        request["parameters"] = {BINARY_OUTPUTS: True}
    head = orjson.dumps(request).decode()
    return (
        f"{{ printf %s {shlex.quote(head)}; head -c {size} /dev/zero; }} |\n"
        f"{call} -H 'Content-Type: application/octet-stream' "
        f"-H 'Inference-Header-Content-Length: {len(head)}' --data-binary @-"
    )
