"""The command `evalmode`: `serve` and `predict` here, the training verbs from the entry points `evalmode.verbs`.

Exit codes: 0 done, 1 the answer is no, 2 the call was wrong. Errors are sentences.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated, NoReturn

import cyclopts
from cyclopts import App, Parameter
from pydantic import ValidationError

from service.errors import EvalmodeError, Refused, WrongCall
from service.misfit import first_misfit
from service.settings import Device, Settings, check_variables

VERBS_GROUP = "evalmode.verbs"

app = App(
    name="evalmode",
    help="Serve a network with BatchNorm exactly as it was evaluated.",
    help_epilogue="""
The whole road:

```
evalmode train data.csv --target COLUMN    # a table becomes a checkpoint
evalmode export CHECKPOINT --name NAME     # a checkpoint becomes a bundle
evalmode serve models                      # bundles answer over HTTP
```
""",
    help_format="markdown",
    version=lambda: version("evalmode"),
    suppress_keyboard_interrupt=False,
)
_VERBS = entry_points(group=VERBS_GROUP)
for _verb in _VERBS:
    app.command(_verb.value, name=_verb.name, help_epilogue="")  # imported when it is called


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    if not arguments or arguments[0] in app.help_flags:
        for verb in _VERBS:
            _ = app[verb.name]  # imports it, for the line that says what it does
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        return _say(2, _sentence(error.__cause__) if isinstance(error.__cause__, ValidationError) else str(error))
    except ValidationError as error:  # of a setting in the environment
        return _say(2, _sentence(error))
    except WrongCall as error:
        return _say(2, str(error))
    except EvalmodeError as error:
        return _say(1, str(error))
    except KeyboardInterrupt:
        return _say(130, "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
    except OSError as error:  # no space, no permission
        return _say(1, f"{error.strerror or error}{f': {error.filename!r}' if error.filename else ''}")
    return 0


def _say(code: int, sentence: str) -> int:
    print(f"evalmode: {sentence}", file=sys.stderr)
    return code


def _sentence(error: ValidationError) -> str:
    """The first thing pydantic found wrong, named as the flag and the variable it can come from."""
    field, why, got = first_misfit(error)
    return f"--{field.replace('_', '-')} (EVALMODE_{field.upper()}) is {got!r}; {why}"


ServiceSettings = Annotated[Settings | None, Parameter(name="*")]


@app.command(
    help_epilogue="""
```
evalmode serve models                      # a repository
evalmode serve models/credit/1 --port 0    # one bundle, on a free port
evalmode serve model.onnx --device cpu     # any ONNX file
```
"""
)
def serve(
    path: Annotated[
        Path | None, Parameter(help="A repository, a model's folder, a bundle or an ONNX file; default: --models.")
    ] = None,
    /,
    *,
    settings: ServiceSettings = None,
) -> None:
    """Serve a model repository, a bundle or an ONNX file over HTTP.

    Every model is led through admission first: structure, digest, golden samples, independence. A version that is
    refused is never served; the newest one that passes is. Every flag is an environment variable too: `--port` is
    `EVALMODE_PORT`.
    """
    from service import server  # each verb imports what it needs

    check_variables(os.environ)
    settings = settings or Settings()
    server.serve(path or settings.models, settings)


@app.command(
    help_epilogue="""
```
evalmode predict models/credit sample.json
echo '{"age": 41, ...}' | evalmode predict models/credit -
```
"""
)
def predict(
    model: Annotated[Path, Parameter(help="A model's folder, a bundle, or a repository that holds one model.")],
    sample: Annotated[
        Path,
        Parameter(
            help="A file with one JSON object of named features; '-' is standard input.", allow_leading_hyphen=True
        ),
    ],
    /,
    *,
    device: Annotated[Device, Parameter(help="Where the model runs.")] = "auto",
) -> None:
    """One prediction in this process: the answer that the service gives, through the same admission."""
    from service.protocol.predict import parse
    from service.repository import load
    from service.runtime import place

    try:
        body = sys.stdin.buffer.read() if str(sample) == "-" else sample.read_bytes()
    except OSError as error:
        raise WrongCall(f"'{sample}' cannot be read: {error.strerror}") from error
    repository = load(model, place(device), Settings(device=device))
    if not repository.ready:
        raise Refused("; ".join(f"{entry.name}/{entry.version} was {entry.reason}" for entry in repository.entries))
    live = repository.only()
    request = parse(live, body)
    answer = request.answer(live.admitted.runtime.run(request.accepted.tensors))
    print(json.dumps(answer, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
