"""Files of a run's folder, which anybody can reach: read where they are files, and written whole or not at all."""

import os
import stat
from pathlib import Path

from settings import Refusal


def read_bytes(path: Path) -> bytes:
    """What is in a file, or in the one that a link leads to. Raises Refusal where it is none or cannot be read."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_bytes()
        why = "is no file"  # of a pipe or a device there may be no end
    except OSError as error:
        why = f"cannot be read: {error.strerror or error}"
    raise Refusal(f"{path}: {why}; put a good copy back")


def read_text(path: Path) -> str:
    """The same as text; raises Refusal where it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: is damaged, no UTF-8 at byte {error.start}; put a good copy back") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write beside and rename, so that the file is whole at every moment; a file that says the same is left alone."""
    if path.is_file() and path.read_bytes() == content:
        return
    partial = path.with_name(f".partial_{path.name}")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
