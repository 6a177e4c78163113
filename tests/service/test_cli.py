"""The command line: exit codes, sentences, settings."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from service.cli import run
from service.errors import DeviceUnavailable
from service.runtime import CPU_PROVIDER, CUDA_PROVIDER, place
from service.settings import Settings
from tests import graphs
from tests.bundles import SAMPLE, write_table_bundle

has_gpu = place("auto").provider == CUDA_PROVIDER


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    file = tmp_path / "sample.json"
    file.write_text(json.dumps(SAMPLE))
    return file


def test_predict_answers_in_process(tmp_path: Path, sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table_bundle(tmp_path / "models", name="credit")
    assert run(["predict", str(tmp_path / "models" / "credit"), str(sample)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["label"] in ("bad", "good")
    assert (answer["model"], answer["version"]) == ("credit", "1")


def test_predict_reads_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table_bundle(tmp_path, name="credit")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(SAMPLE).encode())))
    assert run(["predict", str(tmp_path), "-"]) == 0
    assert "probabilities" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["predict", "{models}", "{tmp}/nothing.json"], 2, "cannot be read: No such file"),
        (["predict", "{tmp}/nothing", "{sample}"], 2, "there is nothing at"),
        (["predict", "{sick}", "{sample}"], 1, "refused at the structure door"),
        (["predict", "{models}", "{bad}"], 1, "feature 'age' is the string 'old'"),
        (["serve", "{tmp}/nothing"], 2, "there is nothing at"),
        (["serve", "{sick}", "--port", "0"], 1, "was admitted, so there is nothing to serve"),
        (["serve", "--port", "99999"], 2, "--port (EVALMODE_PORT) is '99999'; input should be less than or equal to"),
        (
            ["serve", "--device", "tpu"],
            2,
            "--device (EVALMODE_DEVICE) is 'tpu'; input should be 'auto', 'cpu' or 'cuda'",
        ),
        (
            ["serve", "--versions", "latest:x"],
            2,
            "--versions (EVALMODE_VERSIONS) is 'latest:x'; 'latest:x' is no rule for versions; write latest",
        ),
        (["serve", "--prot", "1"], 2, "Unknown option: --prot. Did you mean --port?"),
        (["serve", "{models}", "--host", "256.0.0.1"], 1, "cannot listen on"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_a_wrong_call_and_a_no_are_told_apart(
    tmp_path: Path, sample: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, sentence: str
) -> None:
    """2 for a call that cannot be meant, 1 when the answer is no; one sentence on standard error, no traceback."""
    write_table_bundle(tmp_path / "models", name="credit")
    onnx.save(graphs.batchnorm_model(training=True), tmp_path / "sick.onnx")
    (tmp_path / "bad.json").write_text(json.dumps({**SAMPLE, "age": "old"}))
    places = {
        "models": tmp_path / "models", "tmp": tmp_path, "sample": sample,
        "sick": tmp_path / "sick.onnx", "bad": tmp_path / "bad.json",
    }  # fmt: skip
    assert run([argument.format(**places) for argument in arguments]) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("evalmode: ")
    assert "Traceback" not in said


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table_bundle(tmp_path, name="credit")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["serve", str(tmp_path), "--port", str(port)]) == 1
    said = capsys.readouterr()
    assert "another process has it; choose another with --port" in said.err
    assert "ready" not in said.out


def test_a_flag_beats_the_environment_beats_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().port == 8000
    monkeypatch.setenv("EVALMODE_PORT", "9001")
    monkeypatch.setenv("EVALMODE_DEVICE", "cpu")
    assert (Settings().port, Settings().device) == (9001, "cpu")
    assert Settings(port=9002).port == 9002


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("KEYSFILE", "KEYS_FILE"),
        ("API_KEYS_FILE", "KEYS_FILE"),
        ("KEYS", "KEYS_FILE"),
        ("worker", "WORKERS"),
        ("MAX_BATCH_SIZE", "MAX_BATCH_ROWS"),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, meant: str
) -> None:
    """A service whose operator thinks that it asks for keys does not start without them."""
    for written in (f"EVALMODE_{name}", f"evalmode_{name}"):
        with monkeypatch.context() as environment:
            environment.setenv(written, "2")
            assert run(["serve", "nowhere"]) == 2
        assert f"{written} is no setting, and EVALMODE_{meant} is one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "EVALMODE_SERVICE_HOST",
        "EVALMODE_SERVICE_PORT_HTTP",
        "EVALMODE_PORT_8000_TCP_ADDR",
        "EVALMODE_MODELS_PORT",
        "EVALMODE_",
        "WORKERS",
    ],
)
def test_a_variable_that_others_make_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Kubernetes has some for a Service that is called evalmode."""
    monkeypatch.setenv(name, "tcp://10.0.0.1:80")
    assert run(["serve", "nowhere"]) == 2
    assert "there is nothing at" in capsys.readouterr().err


@pytest.mark.skipif(has_gpu, reason="here onnxruntime can use a GPU")
def test_cuda_without_a_gpu_is_an_error_that_says_what_is_missing() -> None:
    """Never a silent fall back to the CPU."""
    with pytest.raises(
        DeviceUnavailable, match=r"--device cuda: .*(built without CUDA|cannot start CUDA|no CUDA device)"
    ):
        place("cuda")


@pytest.mark.skipif(has_gpu, reason="here onnxruntime can use a GPU")
def test_auto_says_what_it_chose_and_why() -> None:
    placement = place("auto")
    assert placement.provider == CPU_PROVIDER
    assert placement.why.startswith("no usable GPU: ")


def test_what_the_file_system_refuses_is_a_sentence(
    tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(_: Path, model: str | None = None, *, called: str = "", kind: object = None) -> None:
        raise PermissionError(13, "Permission denied", "models")

    monkeypatch.setattr("service.repository.find", closed)
    assert run(["predict", str(tmp_path), str(sample)]) == 1
    assert capsys.readouterr().err == "evalmode: Permission denied: 'models'\n"


def test_the_first_help_says_what_each_verb_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the training half too, which are imported for it."""
    assert run([]) == 0
    said = capsys.readouterr().out
    for sentence in (
        "Train a network with BatchNorm",
        "Export a network",
        "Serve a model repository",
        "One prediction",
    ):
        assert sentence in said


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """Each verb with an example to copy."""
    for verb in ("serve", "predict"):
        assert run([verb, "--help"]) == 0
        assert f"evalmode {verb} models" in capsys.readouterr().out


def test_without_an_engine_it_says_what_to_install(tmp_path: Path) -> None:
    """`pip install evalmode` alone has none, because the CPU's and the GPU's exclude each other."""
    write_table_bundle(tmp_path, name="credit")
    hidden = "import sys; sys.modules['onnxruntime'] = None; from service.cli import run; "
    program = f"{hidden}sys.exit(run(['serve', {str(tmp_path)!r}]))"
    refused = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert refused.returncode == 2
    assert "pip install 'evalmode[service]'" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["timeout_s", "max_queue_s", "shutdown_delay_s", "admission_limit_s", "reload_s"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_time_is_a_number(name: str, value: str) -> None:
    """One without an end is 0 where that can be meant; infinity used to break every prediction."""
    with pytest.raises(ValueError, match="finite number"):
        Settings(**{name: value})  # type: ignore[arg-type]
