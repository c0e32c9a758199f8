"""A file that one process holds while it works on what stands beside it."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gnome.errors import InvalidInput

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS})


@contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Hold a file, which is gone again at the end; a process that dies lets go.

    Raises InvalidInput with `refusal` where another process holds it; on file systems without locks nothing is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidInput(refusal) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if not _is_at(file, path):  # who held it has removed it since it was opened
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
