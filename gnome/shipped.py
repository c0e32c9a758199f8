"""Where the files are that ship with the program: seeds, references, the validation set, ensembles."""

from pathlib import Path

from gnome.errors import InvalidInput


def shipped_data() -> Path:
    """Find the folder: inside the installed package, or `data` of a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_shipped", package.parent / "data"):
        if (folder / "ensembles").is_dir():
            return folder
    raise InvalidInput(f"the shipped data were not found beside {package}; install the package again")
