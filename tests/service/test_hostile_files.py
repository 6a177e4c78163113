"""What a bundle's folder may hold that is not what it says: links, pipes, devices, absurd sizes and tolerances."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service import bundle
from service.admission import admit, check_structure
from service.errors import AdmissionRefused
from service.graph import external
from service.runtime import OnnxRuntime, place
from tests import graphs
from tests.bundles import write_table_bundle


def weights_at(folder: Path, location: str, **entries: str) -> Path:
    """A model whose mean is said to lie elsewhere."""
    model = graphs.batchnorm_model()
    (mean,) = [tensor for tensor in model.graph.initializer if tensor.name == "mean"]
    mean.ClearField("raw_data")
    mean.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        mean.external_data.add(key=key, value=value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(AdmissionRefused) as refused:
        admit(bundle.read(folder, name="net", version="1"), place("cpu"), threads=1)
    return str(refused.value)


@pytest.mark.parametrize("location", ["/etc/hostname", "../secret", "a/../../secret", "", ".", "x\0y", "no/such"])
def test_weights_that_are_not_a_file_inside(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(12))
    said = refusal(weights_at(tmp_path / "1", location))
    assert any(words in said for words in ("outside", "is not a plain file", "cannot be read"))


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/null", "../secret", "loop"])
def test_a_link_that_leads_out(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(12))
    folder = weights_at(tmp_path / "1", "loop")
    (folder / "loop").symlink_to(target)
    assert "outside" in (said := refusal(folder)) or "cannot be read" in said


@pytest.mark.timeout(10)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("model.onnx", "weights", "model.json"):
        folder = weights_at(tmp_path / name.replace(".", "_"), "weights")
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        if name == "model.json":
            (folder / "weights").write_bytes(np.ones(3, np.float32).tobytes())
        assert "is not a plain file" in refusal(folder)


def test_a_link_exchanged_between_look_and_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it was opened it led out, and when it is looked at it leads inside."""
    (tmp_path / "secret").write_bytes(bytes(12))
    folder = weights_at(tmp_path / "1", "weights")
    (folder / "weights").symlink_to("../secret")
    opened = os.open

    def exchanging(path: Any, *rest: Any) -> int:
        handle = opened(path, *rest)
        if str(path).endswith("weights"):
            (folder / "weights").unlink()
            (folder / "weights").write_bytes(bytes(12))
        return handle

    monkeypatch.setattr("service.bundle.os.open", exchanging)
    assert "was exchanged while it was being read" in refusal(folder)


@pytest.mark.parametrize(("offset", "length"), [("0", "13"), ("8", "8"), ("-1", "12"), (str(2**70), "12"), ("x", "12")])
def test_weights_beyond_their_file(tmp_path: Path, offset: str, length: str) -> None:
    folder = weights_at(tmp_path / "1", "weights", offset=offset, length=length)
    (folder / "weights").write_bytes(bytes(12))
    assert "structure" in refusal(folder)


def test_one_part_of_a_file_named_by_many(tmp_path: Path) -> None:
    """A gigabyte that is not even on the disk, three times."""
    model = graphs.batchnorm_model()
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_bytes(model.SerializeToString())
    contents = {"model.onnx": model.SerializeToString(), "weights": bytes(2**20)}
    many = onnx.ModelProto.FromString(contents["model.onnx"])
    for i in range(2100):
        many.graph.initializer.add(name=f"w{i}", data_location=TensorProto.EXTERNAL).external_data.add(
            key="location", value="weights"
        )
    found = bundle.Bundle(name="n", version="1", folder=tmp_path, contents=contents, passport=None)
    contents["model.onnx"] = many.SerializeToString()
    with pytest.raises(AdmissionRefused, match="with its weights inside has more than"):
        _ = found.model


def test_a_file_without_end(tmp_path: Path) -> None:
    """Of a size that is written in its folder only."""
    folder = weights_at(tmp_path / "1", "weights")
    with (folder / "weights").open("wb") as file:
        file.truncate(2**42)
    assert "bytes are read" in refusal(folder).replace(" are read", " bytes are read")


SECRET = b"not for you!"


def secret() -> onnx.TensorProto:
    """A tensor whose values are the bytes of a file in the working directory."""
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.UINT8, dims=[12], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "secret", "offset": "0", "length": "12"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def reading_model(*, calls: int = 0, nodes: Sequence[onnx.NodeProto] = ()) -> onnx.ModelProto:
    """y = w[x], byte by byte, in a function that is called through so many others; the first calls it with w."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    gather = [*nodes, helper.make_node("Gather", ["w", "x"], ["y"])]
    functions = [helper.make_function("f", f"F{calls}", ["x"], ["y"], gather, opsets, ["v"] if nodes else [])]
    for number in range(calls):
        call = helper.make_node(f"F{number + 1}", ["x"], ["y"], domain="f")
        functions.append(helper.make_function("f", f"F{number}", ["x"], ["y"], [call], opsets))
    made = graphs.model(
        [helper.make_node("F0", ["x"], ["y"], domain="f")] if nodes else gather,
        {},
        x=(TensorProto.INT64, ["batch", 1]),
        y=["batch", 1],
    )
    made.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
    made.opset_import.append(opsets[1])
    if nodes:
        made.functions.extend(functions)
    return made


def constant_of(**said: Any) -> onnx.NodeProto:
    node = helper.make_node("Constant", [], ["w"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, **said)
    return node


def as_an_initializer() -> onnx.ModelProto:
    made = reading_model()
    made.graph.initializer.append(secret())
    return made


def as_the_default_of_a_function(calls: int = 0) -> onnx.ModelProto:
    made = reading_model(calls=calls, nodes=[constant_of(ref_attr_name="v")])
    del made.functions[0].attribute[:]  # a name is one with a default or one without
    made.functions[0].attribute_proto.add(name="v", type=onnx.AttributeProto.TENSOR, t=secret())
    return made


def as_the_default_of_a_function_of_a_function() -> onnx.ModelProto:
    return as_the_default_of_a_function(calls=2)


def in_a_function() -> onnx.ModelProto:
    made = reading_model(nodes=[constant_of(t=secret())])
    del made.functions[0].attribute[:]
    return made


def in_a_branch() -> onnx.ModelProto:
    made = reading_model()
    del made.graph.node[:]
    y = helper.make_tensor_value_info("z", TensorProto.UINT8, ["batch", 1])
    body = helper.make_graph([helper.make_node("Gather", ["w", "x"], ["z"])], "body", [], [y], [secret()])
    made.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    made.graph.node.append(helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=body))
    return made


READING = [
    as_an_initializer,
    as_the_default_of_a_function,
    as_the_default_of_a_function_of_a_function,
    in_a_function,
    in_a_branch,
]


@pytest.mark.parametrize("place_of", READING)
def test_a_file_of_the_working_directory_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place_of: Callable[[], onnx.ModelProto]
) -> None:
    """A key may lie there; not when a bundle is read, nor in a graph that comes another way, nor in the engine."""
    monkeypatch.chdir(tmp_path)
    Path("secret").write_bytes(SECRET)
    Path("1").mkdir()
    made = place_of()
    Path("1/model.onnx").write_bytes(made.SerializeToString())
    assert external.locations(made) == ["secret"]
    assert "'secret' cannot be read: No such file" in refusal(Path("1"))
    with pytest.raises(AdmissionRefused, match=r"has weights in other files \('secret'\)"):
        check_structure(made)
    with pytest.raises(AdmissionRefused, match="cannot load it"):
        OnnxRuntime(made.SerializeToString(), place("cpu"), threads=1)
    inside = bundle.read_plain(_beside_its_weights(made)).model
    runtime = OnnxRuntime(inside.SerializeToString(), place("cpu"), threads=1)
    assert runtime.run([np.arange(12).reshape(12, 1)])[0].tobytes() == SECRET  # they do read what they are given


def _beside_its_weights(made: onnx.ModelProto) -> Path:
    Path("2").mkdir()
    Path("2/secret").write_bytes(SECRET)
    Path("2/model.onnx").write_bytes(made.SerializeToString())
    return Path("2/model.onnx")


def _in_every_place() -> Iterator[onnx.ModelProto]:
    """What the format can hold, beyond what the engine reads today."""
    sparse = onnx.SparseTensorProto(values=secret())
    for said in ({"tensors": [secret()]}, {"sparse_tensor": sparse}, {"sparse_tensors": [sparse]}):
        yield onnx.ModelProto(graph=onnx.GraphProto(node=[onnx.NodeProto(attribute=[onnx.AttributeProto(**said)])]))
    weighing = onnx.GraphProto(sparse_initializer=[onnx.SparseTensorProto(indices=secret())])
    graph = onnx.AttributeProto(graphs=[onnx.GraphProto(), onnx.GraphProto(initializer=[secret()])])
    yield onnx.ModelProto(graph=weighing)
    yield onnx.ModelProto(functions=[onnx.FunctionProto(attribute_proto=[graph])])
    yield onnx.ModelProto(training_info=[onnx.TrainingInfoProto(initialization=weighing)])
    yield onnx.ModelProto(training_info=[onnx.TrainingInfoProto(algorithm=onnx.GraphProto(initializer=[secret()]))])


@pytest.mark.parametrize("made", list(_in_every_place()), ids=range(7))
def test_a_tensor_is_found_wherever_the_format_lets_it_stand(made: onnx.ModelProto) -> None:
    assert external.locations(made) == ["secret"]
    assert external.locations(external.brought_inside(made, {"secret": SECRET})) == []


PASSPORTS: dict[str, Any] = {
    "a tolerance that is no number": lambda said: said["golden"]["tolerances"]["probabilities"].update(absolute="NaN"),
    "an endless tolerance": lambda said: said["golden"]["tolerances"]["probabilities"].update(absolute=float("inf")),
    "a negative tolerance": lambda said: said["golden"]["tolerances"]["probabilities"].update(absolute=-1e-9),
    "a tolerance that lets zeros pass": lambda said: said["golden"]["tolerances"]["probabilities"].update(absolute=1.0),
    "a tolerance for another output": lambda said: said["golden"].update(tolerances={"other": {"absolute": 1e-6}}),
    "another type": lambda said: said.update(files=[1, 2]),
    "files outside": lambda said: said["files"].update({"../secret": {"sha256": "0", "size_bytes": 1}}),
}


@pytest.mark.parametrize("fault", PASSPORTS)
def test_a_hostile_passport(tmp_path: Path, fault: str) -> None:
    folder = write_table_bundle(tmp_path)
    said = json.loads((folder / "model.json").read_text())
    PASSPORTS[fault](said)
    (folder / "model.json").write_text(json.dumps(said))
    assert "refused at the" in refusal(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\ud800", "", "null", "{}"])
def test_a_passport_that_is_none(tmp_path: Path, text: str) -> None:
    folder = write_table_bundle(tmp_path)
    (folder / "model.json").write_bytes(text.encode(errors="surrogatepass"))
    assert "model.json is not a passport" in refusal(folder)


TENSORS = {
    "no tensor": b"\xff\xff\xff",
    "absurd dimensions": onnx.TensorProto(data_type=1, dims=[2**40], raw_data=b"1234").SerializeToString(),
    "negative dimensions": onnx.TensorProto(data_type=1, dims=[-1, 2], raw_data=b"12345678").SerializeToString(),
    "dimensions that overflow": onnx.TensorProto(data_type=1, dims=[2**32, 2**32], raw_data=b"").SerializeToString(),
    "no dimension": numpy_helper.from_array(np.array(1, np.float32)).SerializeToString(),
    "text": onnx.TensorProto(data_type=8, dims=[12, 2], string_data=[b"\xff"] * 24).SerializeToString(),
    "another width": numpy_helper.from_array(np.ones((12, 3), np.float32)).SerializeToString(),
    "no type": onnx.TensorProto(dims=[1], data_type=99).SerializeToString(),
    "elsewhere": onnx.TensorProto(
        data_type=1, dims=[3], data_location="EXTERNAL", external_data=[{"key": "location", "value": "/etc/hostname"}]
    ).SerializeToString(),
}


@pytest.mark.parametrize("part", ["input_0", "output_0"])
@pytest.mark.parametrize("fault", TENSORS)
def test_hostile_golden_samples(tmp_path: Path, part: str, fault: str) -> None:
    """With the digest that the passport says, so that only their contents are wrong."""
    folder = write_table_bundle(tmp_path)
    path = f"test_data_set_0/{part}.pb"
    (folder / path).write_bytes(TENSORS[fault])
    said = json.loads((folder / "model.json").read_text())
    said["files"][path] = bundle.digest(TENSORS[fault]).model_dump()
    (folder / "model.json").write_text(json.dumps(said))
    assert "refused at the golden door" in refusal(folder)


def test_a_folder_of_ten_thousand(tmp_path: Path) -> None:
    """Most of them hold nothing; the one that does is found at once."""
    for i in range(10_000):
        (tmp_path / f"empty{i}").mkdir()
    (tmp_path / "a\x1b[2J\nready").mkdir()
    write_table_bundle(tmp_path)
    from service.places import find

    assert [found.name for found in find(tmp_path)] == ["table"]
