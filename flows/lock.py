"""A file that one process holds while it works on what stands beside it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gnome.errors import InvalidInput


@contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Hold a file, which is gone again at the end, with its folder where nothing else is in it.

    A process that dies lets go.  Raises InvalidInput with `refusal` where another process holds it; on file systems without locks nothing
    is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(refusal) from None
        except OSError:  # no locks here
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # something else is in it
                path.parent.rmdir()
