"""The command line: one program, `gnome`.

Commands import what they need when they run, so that `gnome query` pays for neither networks nor Prefect.
Exit codes: 0 done, 1 failed, 2 bad usage or unusable input, 130 interrupted.  Errors are one line on stderr.
"""

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from tomllib import TOMLDecodeError
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError
from rich.console import Console

from flows.settings import Settings, refuse_misspelt_variables
from gnome import __version__
from gnome.errors import GnomeError, InvalidInput

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C, as typer ends a command then."""

_QUIET_PREFECT: Final = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
"""Prefect reports its use unless it is told not to."""

app = typer.Typer(
    name="gnome",
    help="Discover stable crystals: propose, filter, relax, keep what is stable, learn, and go on.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"gnome {__version__}\n")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def print_json(value: Any) -> None:
    """Print JSON that every parser reads; numbers that are not finite never get here."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    if hasattr(value, "__dataclass_fields__"):
        return vars(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def make_console(*, stderr: bool = False) -> Console:
    """Make a console; what goes to a file is not folded to the width of a terminal that is not there.

    Brackets are printed as they are: labels and paths may hold some.
    """
    console = Console(stderr=stderr, markup=False, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, width=160, markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; deliberate errors become one line."""
    for module in ("cli_loop", "cli_models", "cli_ensembles", "cli_database"):  # importing registers their commands
        import_module(f"flows.{module}")

    if sys.stdout is None or sys.stderr is None:  # closed by the shell, as in `>&-`: files opened later would take its place
        with suppress(OSError):
            os.write(2, b"gnome: standard output is closed; send it to /dev/null if it is not wanted\n")
        raise SystemExit(1)
    for name, value in _QUIET_PREFECT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", "No Pauling electronegativity", UserWarning)  # pymatgen, on the noble gases
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # what a batch system sends when the time is up
    try:
        refuse_misspelt_variables(os.environ)
        app(args=list(arguments) if arguments is not None else None, standalone_mode=True, prog_name="gnome")
    except (GnomeError, ValidationError, TOMLDecodeError, UnicodeError, OSError) as error:
        sys.stderr.write("gnome: " + " ".join(_line_of(error).split()) + "\n")
        bad_usage = isinstance(error, InvalidInput | ValidationError | TOMLDecodeError | UnicodeError)
        raise SystemExit(2 if bad_usage else 1) from None
    except MemoryError as error:
        sys.stderr.write(
            f"gnome: memory does not suffice ({' '.join(str(error).split())[:120]}); give fewer or smaller crystals at once\n"
        )
        raise SystemExit(1) from None
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            sys.stderr.write("\ngnome: interrupted; what was kept is taken up when the same command is run again\n")
        raise


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _line_of(error: Exception) -> str:
    """Say a deliberate error, or one of the surroundings, in one line."""
    if isinstance(error, ValidationError):  # of our settings; whatever else validates raises errors of this project
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        shown = f" is {first['input']!r}" if name in Settings.model_fields and name != "database_url" else ""  # no passwords
        return f"settings: {name}{shown}: {first['msg']}; see the GNOME_... variables and gnome.toml"
    if isinstance(error, TOMLDecodeError):
        return f"gnome.toml cannot be read: {error}"
    if isinstance(error, UnicodeError):  # of gnome.toml, or of an argument that the shell passed on as it was
        return f"text that is not UTF-8, in gnome.toml or on the command line: {error}"
    if isinstance(error, OSError):
        return f"{error.filename or 'standard output'}: {error.strerror or error}"
    return str(error)


if __name__ == "__main__":  # as `python -m flows.cli`: under the name that the commands register with
    import_module("flows.cli").main()
