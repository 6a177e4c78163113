"""One frozen `Settings`: every field is a flag of `evalmode serve` and an environment variable `EVALMODE_<FIELD>`.

A flag beats the environment, the environment beats the default.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service import policy
from service.access_log import AccessLogChoice
from service.errors import WrongCall
from service.logs import LogFormat

Device = Literal["auto", "cpu", "cuda"]
Numerics = Literal["exact", "bounded"]
LogLevel = Literal["debug", "info", "warning", "error"]

PREFIX = "EVALMODE_"
_OF_KUBERNETES = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT|PORT_\d+_\w+)$")


class Settings(BaseSettings):
    """How the service runs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    models: Path = Field(default=Path("models"), description="What to serve when no PATH is given.")
    name: str = Field(default="", description="What the one model at PATH is called; by default as its folder or file.")
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 is every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    device: Device = Field(default="auto", description="Where models run; 'auto' takes a usable GPU if there is one.")
    gpu_memory_limit_bytes: int = Field(default=0, ge=0, description="The most GPU memory of one model; 0 is no limit.")
    workers: int = Field(default=1, ge=1, le=256, description="Processes that serve on the one port.")
    threads: int = Field(
        default=0, ge=0, description="Threads inside one run; 0 is one for a short run, else what a worker may use."
    )
    max_batch_rows: int = Field(default=64, ge=1, le=65536, description="The most rows that run together.")
    versions: str = Field(
        default="latest",
        description="What is live of a model: 'latest', 'latest:N', or by name: 'latest credit=3,7 fraud=latest:2'.",
    )
    reload_s: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="How often the folder is looked at for new versions; 0 is never, `load` only.",
    )
    numerics: Numerics = Field(
        default="exact",
        description="'exact': rows share a batch where that changes no bit; 'bounded': or only rounds.",
    )
    max_queue_rows: int = Field(default=4096, ge=1, description="The most rows of a model that wait; more get 429.")
    max_queue_bytes: int = Field(
        default=256 * 2**20, ge=1, description="The most bytes of them, or an eighth of the memory; more get 429."
    )
    max_queue_s: float = Field(
        default=0.25,
        ge=0,
        allow_inf_nan=False,
        description="The longest expected wait, at the measured rate; more get 429, but 32 requests may always wait. "
        "0 is no limit.",
    )
    max_reading_bytes: int = Field(
        default=256 * 2**20,
        ge=1,
        description="The most bytes of bodies being read, and as many of answers being read by their clients, or an "
        "eighth of the memory; two bodies at least. More get 429.",
    )
    timeout_s: float = Field(
        default=30.0, ge=0, allow_inf_nan=False, description="How long a caller waits who does not say; 0 is no limit."
    )
    shutdown_delay_s: float = Field(
        default=2.0,
        ge=0,
        allow_inf_nan=False,
        description="After SIGTERM, how long it is not ready and answers all the same.",
    )
    max_connections: int = Field(
        default=10_000, ge=1, description="The most open connections of a worker; idle ones give way to new ones."
    )
    admission_limit_s: float = Field(
        default=60.0, gt=0, allow_inf_nan=False, description="How long the admission of one version may take."
    )
    body_limit_bytes: int = Field(default=32 * 2**20, ge=1, description="The largest request body that is read.")
    keys_file: Path | None = Field(
        default=None, description="API keys with their rights, made with 'evalmode key'; without it none are needed."
    )
    tls_certificate: Path | None = Field(
        default=None, description="A certificate and its chain (PEM), to serve over TLS; with --tls-key."
    )
    tls_key: Path | None = Field(default=None, description="The private key of the certificate (PEM).")
    log_level: LogLevel = Field(default="info", description="The least that is logged.")
    log_format: LogFormat = Field(default="auto", description="'auto' is text on a terminal, JSON lines elsewhere.")
    access_log: AccessLogChoice = Field(
        default="sampled", description="Requests that are logged; 'sampled' and 'errors' are a few lines a second."
    )

    @field_validator("versions")
    @classmethod
    def _is_a_policy(cls, versions: str) -> str:
        policy.parse(versions)
        return versions


def check_variables(names: Iterable[str]) -> None:
    """Of an environment. Names that resemble no setting are none of ours, nor are those that Kubernetes makes for a
    Service called evalmode, or evalmode-models.

    Raises:
        WrongCall: one is nearly a setting: whoever wrote it means to have set that.
    """
    for name in names:
        field, known = name[len(PREFIX) :].lower(), Settings.model_fields
        if name.upper().startswith(PREFIX) and field not in known and not _OF_KUBERNETES.search(name):
            longer = [setting for setting in known if len(field) > 3 and setting.startswith(field)]
            for meant in (longer or get_close_matches(field, known, cutoff=0.7))[:1]:
                raise WrongCall(f"{name} is no setting, and {PREFIX}{meant.upper()} is one; rename it, or unset it")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
