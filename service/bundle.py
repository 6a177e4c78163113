"""A bundle: the folder `models/NAME/VERSION/` with `model.onnx`, its passport `model.json`, and golden samples.

Rule 1: `read` looks at every file once; what is digested and what is loaded are the same bytes.
Rule 2: `write` makes a folder appear whole or not at all, and never overwrites a version.
Rule 3: nothing here judges; the doors in `service.admission` do.
Rule 4: what was tried elsewhere is not even parsed here where its bytes are other ones.
Rule 5: a bundle may come from anybody. Only plain files inside its folder are read, and none that memory cannot hold.

The folder is also a version folder of a Triton repository, and `test_data_set_0` is ONNX's own layout for test data
(`input_0.pb`, `output_0.pb`: TensorProto files in the order of the graph's inputs and outputs).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from service.errors import AdmissionRefused, first_line
from service.files import whole_folder
from service.graph import external
from service.limits import machine_memory_bytes
from service.misfit import first_misfit
from service.places import MODEL_FILE as MODEL_FILE
from service.places import checked_name as checked_name
from service.places import plain_name as plain_name
from service.places import versions_in as versions_in
from service.signature import Signature

PASSPORT_FILE = "model.json"
GOLDEN_FOLDER = "test_data_set_0"
REPORT_FILE = "report.html"
"""For people; the service does not read it."""
LONGEST_PASSPORT_BYTES = 64 * 2**20
"""Of tens of thousands of layers."""

Digests = Mapping[str, str]
"""Of each file that was read, by path inside: its size in bytes and its SHA-256, as `12:9f86d0...`."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileDigest(_Value):
    sha256: str
    size_bytes: int


class Extent(_Value):
    """The smallest and largest entry of a per-channel vector."""

    smallest: float
    largest: float


class LayerSummary(_Value):
    """One BatchNorm layer as it was frozen."""

    layer: str
    """The module's path in the PyTorch network, e.g. `blocks.0.norm`."""
    channels: int
    eps: float
    momentum: float | None
    """PyTorch's convention: the weight of the new batch; None is the cumulative average."""
    num_batches_tracked: int | None
    affine: bool
    running_mean: Extent
    running_var: Extent
    initial_weight: float | None
    """The share of the running statistics still held by their initial values: (1 - momentum)^num_batches_tracked."""


class Tolerance(_Value):
    """How far an output may lie from PyTorch's in eval mode, from the float error analysis of this network."""

    absolute: float = Field(ge=0, allow_inf_nan=False)


class GoldenSummary(_Value):
    """What the golden samples are and how near the replay must come."""

    rows: int
    source: str
    tolerances: dict[str, Tolerance]
    """One for each output by name."""


class ParityFigure(_Value):
    """The largest difference between two ways to compute the same outputs, and how large it may be."""

    name: str
    difference: float
    bound: float
    unit: str = "absolute"


class IndependenceFigure(_Value):
    """Whether a row's answer depends on the rows beside it.

    `exact`: not in any bit, at any batch size tried. `bounded`: not on their contents, and on how many there are by
    rounding only, at most `bound`.
    """

    kind: Literal["exact", "bounded"]
    bound: float
    batch_sizes: tuple[int, ...]


class Passport(_Value):
    """`model.json`: everything about the model that the graph cannot say."""

    format: Literal["evalmode/1"] = "evalmode/1"
    name: str
    version: str
    signature: Signature
    files: dict[str, FileDigest]
    """Every other file of the bundle that the service reads, by its path inside the folder."""
    batchnorm: tuple[LayerSummary, ...]
    golden: GoldenSummary | None
    parity: tuple[ParityFigure, ...] = ()
    independence: IndependenceFigure | None = None
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    card: str | None = None
    """What the model is for, what was left out and why: for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle as read, not yet judged."""

    name: str
    version: str
    folder: Path
    contents: Mapping[str, bytes]
    """The bytes of `model.onnx`, of the files with its weights and of those the passport names, by path inside."""
    passport: Passport | None
    """None for a plain ONNX file: admission then knows less."""
    passport_bytes: bytes = b""
    """As read."""

    @property
    def digests(self) -> Digests:
        passport = {PASSPORT_FILE: self.passport_bytes} if self.passport is not None else {}
        return {path: _digest(content) for path, content in sorted({**self.contents, **passport}.items())}

    @property
    def model(self) -> onnx.ModelProto:
        """The model as parsed from `model.onnx`, with all weights inside; made anew at each call.

        Raises:
            AdmissionRefused: the bytes are not a model, or a file with weights is cut short.
        """
        model = _parsed(self.contents[MODEL_FILE])
        try:
            return external.brought_inside(model, self.contents) if external.locations(model) else model
        except ValueError as error:
            raise AdmissionRefused("structure", str(error)) from error

    def golden(self, part: Literal["input", "output"]) -> list[NDArray[Any]]:
        """The golden inputs or outputs, in the graph's order, each with a batch axis. Empty when there are none.

        Raises:
            AdmissionRefused: one of them is not a tensor with a batch axis and its data.
        """
        arrays: list[NDArray[Any]] = []
        while (content := self.contents.get(path := f"{GOLDEN_FOLDER}/{part}_{len(arrays)}.pb")) is not None:
            arrays.append(_golden(path, content))
        return arrays


def digest(content: bytes) -> FileDigest:
    return FileDigest(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


def next_version(model_folder: Path) -> str:
    """The integer after the highest one that is there."""
    taken = versions_in(model_folder) if model_folder.is_dir() else []
    return str(max((int(version) for version in taken if version.isdecimal()), default=0) + 1)


def read(folder: Path, *, name: str, version: str, tried: Digests | None = None) -> Bundle:
    """Read a bundle's files.

    Args:
        tried: what they are to be; None: whatever they are.

    Raises:
        AdmissionRefused: `model.onnx` or a file named by the passport is not readable, or the passport is not valid, or
            it is missing where other files of a bundle are, or a file is not what was tried.
    """
    contents = {MODEL_FILE: _read(folder, MODEL_FILE, external.MOST_BYTES, wanted=_wanted(MODEL_FILE, tried))}
    _read_weights(folder, contents, tried)
    if not os.path.lexists(folder / PASSPORT_FILE) and PASSPORT_FILE not in (tried or ()):  # a link to nothing is none
        _check_plain(folder)
        return Bundle(name=name, version=version, folder=folder, contents=contents, passport=None)
    passport_bytes = _read(folder, PASSPORT_FILE, LONGEST_PASSPORT_BYTES, wanted=_wanted(PASSPORT_FILE, tried))
    try:
        passport = Passport.model_validate_json(passport_bytes)
    except ValidationError as error:
        where, why, _ = first_misfit(error)
        raise AdmissionRefused(
            "digest", f"{PASSPORT_FILE} is not a passport: {where or 'the document'}: {why}; {_AGAIN}"
        ) from error
    for path in passport.files:
        if path not in contents:
            contents[path] = _read(folder, path, wanted=_wanted(path, tried))
    return Bundle(
        name=name, version=version, folder=folder, contents=contents, passport=passport, passport_bytes=passport_bytes
    )


def _check_plain(folder: Path) -> None:
    """Whoever copies a bundle may bring its passport last, or forget it."""
    for path in (GOLDEN_FOLDER, REPORT_FILE):
        if os.path.lexists(folder / path):
            raise AdmissionRefused(
                "digest",
                f"it has '{path}' and no passport ({PASSPORT_FILE}), so nothing says whether its files are whole; copy "
                f"all of the bundle, or take '{path}' away if this is meant to be a plain ONNX file",
            )


def read_plain(file: Path, *, tried: Digests | None = None) -> Bundle:
    """A plain ONNX file as a bundle without a passport, version 1, named after the file; `tried` as of `read`."""
    contents = {MODEL_FILE: _read(file.parent, file.name, external.MOST_BYTES, wanted=_wanted(MODEL_FILE, tried))}
    _read_weights(file.parent, contents, tried)
    return Bundle(name=plain_name(file), version="1", folder=file.parent, contents=contents, passport=None)


def _read_weights(folder: Path, contents: dict[str, bytes], tried: Digests | None) -> None:
    for path in external.locations(_parsed(contents[MODEL_FILE])):
        contents[path] = _read(folder, path, wanted=_wanted(path, tried))


def _wanted(path: str, tried: Digests | None) -> str | None:
    return None if tried is None else tried.get(path, "")


def _digest(content: bytes) -> str:
    return f"{len(content)}:{hashlib.sha256(content).hexdigest()}"


_AGAIN = "copy it again, whole, or export it again"


def _parsed(content: bytes) -> onnx.ModelProto:
    if not content:
        raise AdmissionRefused("structure", f"{MODEL_FILE} is empty; {_AGAIN}")
    try:
        return onnx.load_model_from_string(content)
    except DecodeError as error:
        raise AdmissionRefused(
            "structure", f"{MODEL_FILE} is not an ONNX model: its {len(content)} bytes cannot be parsed; {_AGAIN}"
        ) from error


def _golden(path: str, content: bytes) -> NDArray[Any]:
    try:
        tensor = onnx.TensorProto.FromString(content)
        if tensor.data_location == onnx.TensorProto.EXTERNAL or not tensor.dims:
            raise ValueError("it has no data of its own, or no batch axis")
        return numpy_helper.to_array(tensor)
    except (DecodeError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise AdmissionRefused("golden", f"'{path}' is not a tensor with a batch axis: {first_line(error)}") from error


def _read(folder: Path, path: str, most_bytes: int | None = None, *, wanted: str | None = None) -> bytes:
    """The bytes of a plain file inside a folder.

    It is opened first and looked at then, so that nobody can put another in its place between the two; and without
    waiting, which a pipe would make us do for ever.

    Args:
        most_bytes: None is what the machine's memory holds.
        wanted: the digest that it must have; None: any.
    """
    changed = AdmissionRefused(
        "digest", f"'{path}' is not what was tried: its files change while they are read; load it again"
    )
    try:
        handle = os.open(folder / path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        _check_inside(folder, path)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise AdmissionRefused("digest", f"'{path}' cannot be read: {reason}; {_AGAIN}") from error
    try:
        found, inside = os.fstat(handle), _check_inside(folder, path)
        if inside is None or not os.path.samestat(inside, found):
            raise AdmissionRefused("structure", f"'{path}' was exchanged while it was being read")
        if not stat.S_ISREG(found.st_mode):
            raise AdmissionRefused("structure", f"'{path}' is not a plain file")
        most_bytes = machine_memory_bytes() if most_bytes is None else most_bytes
        if found.st_size > most_bytes:
            raise AdmissionRefused("structure", f"'{path}' has {found.st_size} bytes; at most {most_bytes} are read")
        if wanted is not None and not wanted.startswith(f"{found.st_size}:"):
            raise changed
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(found.st_size)
    except OSError as error:
        raise AdmissionRefused("digest", f"'{path}' cannot be read: {error.strerror}") from error
    finally:
        os.close(handle)
    if wanted is not None and _digest(content) != wanted:
        raise changed
    return content


def _check_inside(folder: Path, path: str) -> os.stat_result | None:
    """What is at a path, if it is inside the folder; None if there is nothing."""
    try:
        found = (folder / path).resolve()
        if found.is_relative_to(folder.resolve()):
            return found.stat()
    except (OSError, ValueError, RuntimeError):  # it is not there, or its links go round
        return None
    raise AdmissionRefused("structure", f"'{path}' lies outside the bundle's folder")


def golden_files(inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]) -> dict[str, bytes]:
    """Golden samples as files, by path inside the bundle.

    Args:
        inputs, outputs: one array per input and output of the graph, in its order, each with the same batch axis.
    """
    return {
        f"{GOLDEN_FOLDER}/{part}_{i}.pb": numpy_helper.from_array(np.ascontiguousarray(array)).SerializeToString()
        for part, arrays in (("input", inputs), ("output", outputs))
        for i, array in enumerate(arrays)
    }


def write(
    folder: Path,
    *,
    passport: Passport,
    contents: Mapping[str, bytes],
    unread: Mapping[str, bytes] | None = None,
    check: Callable[[Bundle], object] = lambda _: None,
) -> None:
    """Write a bundle whole.

    Args:
        folder: `models/NAME/VERSION`, which must not be there yet.
        contents: every file that the service reads, by path inside the folder, but the passport, which holds their
            digests.
        unread: files for people, by path inside the folder.
        check: is given the bundle as it was read back from the disk; if it raises, there is no bundle.

    Raises:
        FileExistsError: the version is already there.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    with whole_folder(folder) as beside:
        for path, content in {**contents, **(unread or {})}.items():
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            (beside / path).write_bytes(content)
        (beside / PASSPORT_FILE).write_text(passport.model_dump_json(indent=2) + "\n", encoding="utf-8")
        check(read(beside, name=passport.name, version=passport.version))
