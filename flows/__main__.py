"""What `gnome` and `python -m flows` start: the command line, which takes half a second to be there and may be interrupted before."""

import os
import sys

from gnome.processes import PASSIVE_THREADS


def main() -> None:
    """Run a command; an interruption of the start is one line too."""
    for name, value in PASSIVE_THREADS.items():  # read by OpenMP when torch loads it, so before anything does
        os.environ.setdefault(name, value)
    try:
        from flows.cli import main as run  # noqa: PLC0415 - within reach of the except

        run()
    except KeyboardInterrupt:
        sys.stderr.write("\ngnome: interrupted before it began\n")
        raise SystemExit(130) from None  # as flows.cli ends then, which may not be there


if __name__ == "__main__":
    main()
