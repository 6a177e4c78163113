"""`evalmode fold` and `evalmode freeze`: an ONNX file becomes another one. They need neither torch nor a network.

Both write whole or not at all and never over a file that is there, say what became of each BatchNorm layer, and write
weights inside the file.
"""

from __future__ import annotations

from pathlib import Path

from service import bundle
from service.bundle import Bundle
from service.errors import WrongCall
from service.files import write_whole


def fold(model: Path, out: Path, /) -> None:
    """Fold the BatchNorm of a frozen ONNX model into the layers beside it: the same function without the nodes.

    This is what 'evalmode serve' does in memory when it loads a model, so it is not needed for serving. Each layer is
    computed in float64, and the result is compared with the original on the golden samples, if there are any, and on
    made-up rows; it is written only if they agree within rounding. What cannot be folded exactly is kept.

    Examples:

        evalmode fold model.onnx folded.onnx
        evalmode fold models/credit/1 folded.onnx

    Parameters
    ----------
    model
        An ONNX file, or a bundle's folder, which brings golden samples.
    out
        The file to write.
    """
    from service.admission import check_batch_axis, check_structure, sealed
    from service.folding import folded_if_same, trials
    from service.runtime import OnnxRuntime, place

    _require_free(out)
    read = _read(model)
    original = sealed(read.model)
    check_structure(original)
    cpu = place("cpu")
    plain = OnnxRuntime(original.SerializeToString(), cpu)
    check_batch_axis(plain.inputs)
    found = folded_if_same(original, plain, lambda content: OnnxRuntime(content, cpu), trials(read, plain))
    write_whole(out, found.model.SerializeToString())
    for layer in found.folds:
        print(f"  {layer.layer}: {f'folded into {layer.into}' if layer.into else f'kept: {layer.kept_because}'}")
    count = sum(1 for layer in found.folds if layer.into)
    print(f"\nfolded {count} of {len(found.folds)} BatchNorm layers\nwritten: {out}")


def freeze(model: Path, out: Path, /) -> None:
    """Rescue an ONNX model that was exported in training mode, if its statistics are provably trained.

    Such a file normalises with the statistics of each request, and answers every single sample with a constant. What is
    written uses the running statistics that the file holds. That is only right if they were learned, so the file must
    prove it: they are constants, finite, and the variances of each layer prove five updates or more, which no exporter
    makes by itself. The better way is to export the network again, in eval mode.

    Examples:

        evalmode freeze training.onnx frozen.onnx

    Parameters
    ----------
    model
        An ONNX file.
    out
        The file to write.
    """
    from service.admission import check_structure
    from service.graph.freeze import freeze as frozen_graph

    _require_free(out)
    frozen = frozen_graph(_read(model).model)
    check_structure(frozen.model)
    write_whole(out, frozen.model.SerializeToString())
    for layer in frozen.layers:
        proof = f"its variances prove {layer.least_updates} updates or more"
        print(f"  {layer.layer}: {layer.channels} channels, frozen; {proof}")
    if frozen.dropouts:
        print(f"  {frozen.dropouts} Dropout nodes switched off")
    if frozen.layers:
        print(
            "note: an exporter that traced the network in training mode has moved the statistics by one step, on its "
            "dummy input; a file cannot show it. The better way is to export the network again, in eval mode."
        )
    print(f"\nfroze {len(frozen.layers)} BatchNorm layers\nwritten: {out}\nnext:    evalmode serve {out}")


def _read(path: Path) -> Bundle:
    """A bundle's folder or an ONNX file.

    Raises:
        WrongCall: there is neither.
    """
    if path.is_dir() and (path / bundle.MODEL_FILE).is_file():
        return bundle.read(path, name=bundle.plain_name(path.parent), version=path.name)
    if not path.is_file():
        what = "holds no model.onnx" if path.is_dir() else "is not there"
        raise WrongCall(f"'{path}' {what}; name an ONNX file or a bundle's folder")
    return bundle.read_plain(path)


def _require_free(out: Path) -> None:
    if out.exists():
        raise WrongCall(f"'{out}' is already there and is not replaced; name another file")
