"""Files that are packed with gzip, unpacked within bounds."""

import gzip
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from gnome.errors import InvalidCrystal

_CHUNK: Final = 1 << 20
MOST_RATIO: Final = 200
"""Bytes unpacked for a packed one: crystals in text have 5 to 30, a file made to fill the disk has 1,000."""
ALWAYS_BYTES: Final = 64 * 2**20
"""What may be unpacked whatever its ratio."""


def is_packed(path: Path) -> bool:
    """Say whether a name is that of a packed file."""
    return path.suffix.lower() == ".gz"


@contextmanager
def unpacked(path: Path, limit: int) -> Iterator[Path]:
    """Give a file that is not packed: the file itself, or a temporary copy under its name without `.gz`.

    Raises InvalidCrystal for what is no gzip file or damaged, and where `limit` bytes or `MOST_RATIO` are passed, without going on.
    """
    if not is_packed(path):
        yield path
        return
    most = min(limit, max(ALWAYS_BYTES, MOST_RATIO * path.stat().st_size))
    with tempfile.TemporaryDirectory(prefix="gnome-") as folder:
        copy = Path(folder) / (path.stem or "unnamed")
        try:
            _unpack(path, copy, most)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InvalidCrystal("malformed", f"cannot be unpacked ({error}); is it a whole .gz file?") from None
        yield copy


def _unpack(path: Path, copy: Path, most: int) -> None:
    n_bytes = 0
    with gzip.open(path) as packed, copy.open("wb") as out:
        while chunk := packed.read(_CHUNK):
            n_bytes += len(chunk)
            if n_bytes > most:
                raise InvalidCrystal(
                    "too_large", f"unpacks to more than {most} bytes, the limit; split it, or unpack it yourself"
                )
            out.write(chunk)
