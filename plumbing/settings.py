"""Settings from the environment, each from the variable of its name in capitals."""

import re
import typing
from collections.abc import Container, Mapping
from typing import Annotated, Literal, Self, TypeVar

import msgspec
from msgspec import Meta, Struct

from plumbing import guard
from plumbing.address import read_address, with_password
from plumbing.process import StartError

PORT_MAX = 65_535
SURROGATE = re.compile("[\ud800-\udfff]")  # what stands in os.environ for what is not UTF-8

Port = Annotated[int, Meta(ge=0, le=PORT_MAX)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
SettingsT = TypeVar("SettingsT", bound=Struct)


def read_settings(
    shape: type[SettingsT], environ: Mapping[str, str], paths: Container[str] = ()
) -> SettingsT:
    """Read settings of a shape, which names them in capitals; `paths` names those that may hold any
    bytes. Raises StartError naming a wrong one.
    """
    for name in shape.__struct_encode_fields__:
        if name not in paths and SURROGATE.search(environ.get(name, "")):
            raise StartError(f"{name} must be in UTF-8")
    try:
        return msgspec.convert(environ, shape, strict=False)
    except msgspec.ValidationError as error:
        reason, _, name = str(error).rpartition(" - at `$.")
        name = name.rstrip("`")
        if choices := typing.get_args(typing.get_type_hints(shape)[name.lower()]):
            reason = f"must be {' or '.join(choices)}"
        raise StartError(f"{name}={environ.get(name)!r}: {reason}") from None


class ServerSettings(Struct, frozen=True, kw_only=True, rename=str.upper):
    """What any server of ours is told from outside; an application adds its own."""

    host: str = "127.0.0.1"
    port: Port = 8080
    data_dir: Annotated[str, Meta(min_length=1)] = "./data"
    database_url: str = ""
    database_password: str = ""
    database_connections: Annotated[int, Meta(ge=1, le=100)] = 10
    secret_key: str = ""
    secret_key_old: str = ""
    workers: Annotated[int, Meta(ge=1, le=16)] = 1
    trusted_proxies: str = ""
    cors_origins: str = ""
    access_log: Literal["on", "off"] = "off"
    log_format: Literal["text", "json"] = "text"
    metrics_port: Port = 0
    metrics_host: str = "127.0.0.1"
    rate_limits: Literal["on", "off"] = "on"
    connections_per_address: Count = 4000
    calls_per_address: Count = 32
    calls_per_user: Count = 4
    reads_per_user: Count = 2

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings from environment variables. Raises StartError naming a wrong one."""
        settings = read_settings(cls, environ, paths=("DATA_DIR",))
        settings.check()
        return settings

    def check(self) -> None:
        """Raise StartError where a text is not what it stands for, or two settings do not agree."""
        if self.database:
            read_address(self.database)
            if not self.secret_key:
                raise StartError("SECRET_KEY must be set (32 bytes or more) where DATABASE_URL is")
        for name in ("secret_key", "secret_key_old"):
            guard.check_secret(name.upper(), getattr(self, name))
        guard.read_networks(self.trusted_proxies)
        guard.read_origins(self.cors_origins)
        if self.metrics_port and self.metrics_port == self.port:
            raise StartError(f"METRICS_PORT={self.metrics_port}: PORT={self.port} is the same")

    def bound(self, number: int) -> int:
        """Answer a limit that is a setting; 0 where there are to be none."""
        return number if self.rate_limits == "on" else 0

    @property
    def database(self) -> str:
        """The connection string of a database of one's own, with its password; empty for none."""
        url, password = self.database_url.strip(), self.database_password.rstrip("\r\n")
        return with_password(url, password) if url else ""
