"""Settings by themselves: what is read from the environment, and what is blamed."""

from typing import Literal

import pytest
from msgspec import Struct

from plumbing.process import StartError
from plumbing.settings import Port, ServerSettings, read_settings


class Known(Struct, rename=str.upper):
    """Settings of some program."""

    folder: str = "."
    name: str = "nobody"
    port: Port = 80
    mode: Literal["fast", "safe"] = "safe"


def test_settings_are_read_from_the_variables_of_their_names() -> None:
    """Each is read from its name in capitals; what is not set has its default, and what else is in
    the environment does not count."""
    read = read_settings(Known, {"PORT": "8080", "MODE": "fast", "HOME": "/", "name": "x"})
    assert read == Known(port=8080, mode="fast")


@pytest.mark.parametrize(("environ", "blamed"), [
    ({"PORT": "many"}, "^PORT='many': "), ({"PORT": "65536"}, "^PORT='65536': "),
    ({"MODE": "slow"}, "^MODE='slow': must be fast or safe$"),
    ({"NAME": "\udcff"}, "^NAME must be in UTF-8$"),
])
def test_wrong_setting_is_blamed(environ: dict[str, str], blamed: str) -> None:
    """What cannot be read is named, with what it may be."""
    with pytest.raises(StartError, match=blamed):
        read_settings(Known, environ, paths=("FOLDER",))


def test_path_may_hold_any_bytes() -> None:
    """A file system need not use UTF-8: what stands for a path is let through."""
    assert read_settings(Known, {"FOLDER": "\udcff"}, paths=("FOLDER",)).folder == "\udcff"


def test_metrics_have_a_port_of_their_own() -> None:
    """The metrics are on no port, or on another than the server."""
    for ports in ({"PORT": "0"}, {"METRICS_PORT": "0"}, {"METRICS_PORT": "9000"}):
        ServerSettings.load(ports)
    with pytest.raises(StartError, match=r"^METRICS_PORT=9000: PORT=9000 "):
        ServerSettings.load({"METRICS_PORT": "9000", "PORT": "9000"})
