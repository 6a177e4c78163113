"""The keys file and the verb that writes it: a key is shown once, and what is kept of it opens what was granted."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL

import pytest
from cyclopts import App

from service.errors import WrongCall
from service.key_verb import key
from service.keys import KEY_PREFIX, Key, KeysFile, Right, made_key, read_keys

DIGEST = "a" * 64


def file_with(folder: Path, text: str) -> Path:
    path = folder / "keys.txt"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    """Comments, empty lines, several rights, ends of lines of either kind."""
    text = f"# ours\r\n\r\n  shop   predict  sha256:{DIGEST} # since May\r\nop manage,metrics sha256:{'b' * 64}"
    assert read_keys(file_with(tmp_path, text)) == (
        Key(name="shop", rights=frozenset({Right.PREDICT}), digest=bytes.fromhex(DIGEST)),
        Key(name="op", rights=frozenset({Right.MANAGE, Right.METRICS}), digest=b"\xbb" * 32),
    )
    assert read_keys(file_with(tmp_path, "")) == ()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("em_secret", "has 1 words; it takes NAME RIGHTS sha256:HEX"),
        (f"shop predict sha256:{DIGEST} em_secret", "has 4 words"),
        (f"shop, predict sha256:{DIGEST}", "has a name of other characters"),
        (f"{'x' * 65} predict sha256:{DIGEST}", "has a name of other characters"),
        (f"shop predict,em_secret sha256:{DIGEST}", "has a right that is unknown here; rights are 'predict', 'manage'"),
        (f"shop predict, sha256:{DIGEST}", "has a right that is unknown here"),
        (f"shop PREDICT sha256:{DIGEST}", "has a right that is unknown here"),
        ("shop predict em_secret", "does not end in 'sha256:' and 64 hexadecimal digits"),
        (f"shop predict sha256:{DIGEST[1:]}", "does not end in 'sha256:'"),
        (f"shop predict sha256:{DIGEST.upper()}", "does not end in 'sha256:'"),
        (f"shop predict md5:{DIGEST}", "does not end in 'sha256:'"),
        (f"other manage sha256:{'c' * 64}", "has a key that an earlier line has"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path: Path, line: str, sentence: str) -> None:
    """Never by its content."""
    path = file_with(tmp_path, f"# ours\ngood predict sha256:{'c' * 64}\n{line}\n")
    with pytest.raises(WrongCall, match=re.escape(sentence)) as wrong:
        read_keys(path)
    assert f"line 3 of the keys file '{path}'" in str(wrong.value)
    for secret in ("em_secret", DIGEST, DIGEST.upper()):
        assert secret not in str(wrong.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(WrongCall, match="cannot be read: No such file"):
        read_keys(tmp_path / "none")
    with pytest.raises(WrongCall, match="cannot be read: Is a directory"):
        read_keys(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(WrongCall, match="is not text in UTF-8"):
        read_keys(tmp_path / "binary")


def test_a_made_key_is_random_and_kept_as_its_hash(tmp_path: Path) -> None:
    """256 bits of chance, so that its plain SHA-256 is no way back."""
    made = [made_key("shop", ["predict"]) for _ in range(50)]
    assert len({secret for secret, _ in made}) == 50
    for secret, kept in made:
        assert re.fullmatch(rf"{KEY_PREFIX}[A-Za-z0-9_-]{{43}}", secret)
        assert kept.digest == hashlib.sha256(secret.encode()).digest()
        assert secret not in kept.line
        assert read_keys(file_with(tmp_path, kept.line)) == (kept,)


def run(*arguments: str) -> None:
    app = App(result_action="return_value")
    app.command(key, name="key")
    app(["key", *arguments], exit_on_error=False, print_error=False)


def test_the_verb_shows_the_key_once_and_adds_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a file of its owner alone, behind what was there."""
    path = tmp_path / "keys.txt"
    run("shop", "--file", str(path))
    first = re.findall(r"em_\S+", capsys.readouterr().out)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("# ours\n" + path.read_text().rstrip("\n"))  # somebody's editor
    path.chmod(0o640)
    run("op", "--rights", "metrics,manage", "--file", str(path))
    second = re.findall(r"em_\S+", capsys.readouterr().out)
    shop, op = read_keys(path)
    assert [shop.name, op.name] == ["shop", "op"]
    assert [*shop.rights] == [Right.PREDICT]
    assert sorted(op.rights) == [Right.MANAGE, Right.METRICS]
    assert [hashlib.sha256(secret.encode()).digest() for secret in first + second] == [shop.digest, op.digest]
    assert path.read_text().startswith("# ours\n")
    assert "em_" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_may_have_several_keys_and_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That is how a key is changed, and the old one is not to be forgotten."""
    path = tmp_path / "keys.txt"
    for name, said in (("shop", False), ("op", False), ("shop", True)):
        run(name, "--file", str(path))
        assert ("'shop' has 2 keys there now; delete the old line" in capsys.readouterr().out) == said
    assert [key.name for key in read_keys(path)] == ["shop", "op", "shop"]


def test_without_a_file_the_line_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("shop", "--rights", "predict,metrics")
    printed = capsys.readouterr().out
    (secret,) = re.findall(r"em_\S+", printed)
    (line,) = re.findall(r"^line: +(.+)$", printed, re.MULTILINE)
    (kept,) = read_keys(file_with(tmp_path, line))
    assert kept.digest == hashlib.sha256(secret.encode()).digest()


def test_keys_made_at_once_are_all_kept(tmp_path: Path) -> None:
    """Several operators, or a script that runs twice."""
    path = tmp_path / "keys.txt"
    program = "import pathlib, sys; from service.key_verb import key; key(sys.argv[1], file=pathlib.Path(sys.argv[2]))"
    makers = [subprocess.Popen([sys.executable, "-c", program, f"key{i}", path], stdout=DEVNULL) for i in range(6)]
    assert [maker.wait(50) for maker in makers] == [0] * 6
    assert {made.name for made in read_keys(path)} == {f"key{i}" for i in range(6)}


def test_the_file_is_its_owners_when_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment the service could not read it, if it were given back later."""
    path = tmp_path / "keys.txt"
    path.touch()
    done: list[str] = []

    def noting(act: str, real: Callable[..., None]) -> Callable[..., None]:
        def act_and_note(*args: object) -> None:
            done.append(act)
            real(*args)

        return act_and_note

    for act in ("chown", "replace"):
        monkeypatch.setattr(os, act, noting(act, getattr(os, act)))
    run("shop", "--file", str(path))
    assert done == ["chown", "replace"]


def test_a_read_that_failed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A key that was taken back is good for no longer than files are short; and a failure is said once."""
    path = file_with(tmp_path, f"shop predict sha256:{DIGEST}\n")
    file = KeysFile(path)
    path.write_text("")
    with monkeypatch.context() as short:
        short.setattr(Path, "read_text", too_many_open_files)
        for _ in range(3):
            file.look_again()
    assert len(file.keys) == 1
    assert caplog.text.count("cannot be read: Too many open files; the keys that were read before stay") == 1
    file.look_again()
    assert list(file.keys) == []


def too_many_open_files(*_: object, **__: object) -> str:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_file_of_the_same_size_and_time_is_another(tmp_path: Path) -> None:
    """In its place, or exchanged for it."""
    path = file_with(tmp_path, f"shop predict sha256:{DIGEST}\n")
    os.utime(path, ns=(5, 5))
    file = KeysFile(path)
    other = tmp_path / "other"
    for act, digest in ((lambda: os.replace(other, path), "b" * 64), (lambda: shutil.copyfile(other, path), "c" * 64)):
        time.sleep(0.02)  # more than a tick of the file system's clock
        other.write_text(f"shop predict sha256:{digest}\n")
        act()
        os.utime(path, ns=(5, 5))
        file.look_again()
        assert [kept.digest.hex() for kept in file.keys] == [digest]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["shop", "--rights", "sudo"], "there is no right 'sudo'; rights are 'predict', 'manage', 'metrics'"),
        (["shop", "--rights", ""], "there is no right ''"),
        (["my shop"], "'my shop' cannot name a key"),
        (["shop", "--file", "{wrong}"], "line 1 of the keys file"),
        (["shop", "--file", "{wrong}s/keys.txt"], "there is no folder '"),
    ],
)
def test_a_wrong_call_makes_no_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    wrong = file_with(tmp_path, "what is this\n")
    with pytest.raises(WrongCall, match=re.escape(sentence)):
        run(*(argument.format(wrong=wrong) for argument in arguments))
    assert "em_" not in capsys.readouterr().out
    assert wrong.read_text() == "what is this\n"
