"""A disk of the checker's own, which can be full, and lose what was not flushed to it.

It is a file system in a file, mounted where only the checker and what it starts see it: so it is
gone with them, however they end. It takes root, and a loop device that is free.
"""

import ctypes
import fcntl
import os
import struct
import subprocess
import tempfile
from pathlib import Path

CLONE_NEWNS = 0x00020000
EXT4_IOC_SHUTDOWN = 0x8004587D  # as of Linux 4.11
NO_LOG_FLUSH = 2  # not even the journal, as when the power is cut
BYTES = 16 << 30  # the file has holes: it takes what is used


class Disk:
    """A file system in the file `image`, to be mounted at `place`."""

    def __init__(self, image: Path, place: Path, size: int = BYTES) -> None:
        self.image, self.place, self.size = image, place, size
        self._filler = place / "filler"

    def mount(self) -> None:
        """Mount it, first making it where there is none. Raises CalledProcessError."""
        if not self.image.exists():
            with self.image.open("wb") as image:
                image.truncate(self.size)
            _do("mkfs.ext4", "-q", "-F", "-m", "0", str(self.image))
        self.place.mkdir(exist_ok=True)
        _do("mount", "-o", "loop,noinit_itable", str(self.image), str(self.place))

    def unmount(self) -> None:
        """Unmount it; nothing may use it any more."""
        if os.path.ismount(self.place):
            _do("umount", str(self.place))

    def fill(self) -> None:
        """Leave not one block of it free."""
        with self._filler.open("ab", buffering=0) as filler:
            while free := os.statvfs(self.place).f_bavail:
                size = free * os.statvfs(self.place).f_frsize
                try:
                    os.posix_fallocate(filler.fileno(), filler.tell(), size)
                except OSError:  # some of it is for the file system itself
                    break
                filler.seek(0, os.SEEK_END)
            _fill_up(filler.fileno())

    def free(self) -> None:
        """Leave as much free as before."""
        self._filler.unlink(missing_ok=True)

    def cut_power(self) -> None:
        """Let nothing more reach it; whatever was not flushed is lost."""
        folder = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(folder)


def why_none() -> str | None:
    """Tell why there can be no disk of one's own here; None: there can. Where it can, what is
    mounted from now on is seen by this process and its children alone.
    """
    if os.geteuid():
        return "it takes root"
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        return f"no namespace of one's own for mounts ({os.strerror(ctypes.get_errno())})"
    try:
        _do("mount", "--make-rprivate", "/")
        with tempfile.TemporaryDirectory() as folder:
            disk = Disk(Path(folder, "image"), Path(folder, "disk"), 16 << 20)
            disk.mount()
            disk.cut_power()
            disk.unmount()
    except FileNotFoundError as error:
        return f"there is no program {error.filename}"
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} says: {error.stderr.decode().strip()}"
    except OSError as error:
        return f"the file system cannot be cut off ({error.strerror})"
    return None


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _fill_up(descriptor: int) -> None:
    """Write until nothing more can be written, not even a byte."""
    size = 1 << 20
    while size:
        try:
            os.write(descriptor, bytes(size))
        except OSError:
            size //= 2
