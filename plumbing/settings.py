"""Settings from the environment, each from the variable of its name in capitals."""

import re
import typing
from collections.abc import Container, Mapping
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from plumbing.process import StartError

PORT_MAX = 65_535
SURROGATE = re.compile("[\ud800-\udfff]")  # what stands in os.environ for what is not UTF-8

Port = Annotated[int, Meta(ge=0, le=PORT_MAX)]
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


def check_metrics_port(metrics_port: int, port: int) -> None:
    """Insist that the metrics (0: none) have another port than the server. Raises StartError."""
    if metrics_port and metrics_port == port:
        raise StartError(f"METRICS_PORT={metrics_port}: PORT={port} is the same")
