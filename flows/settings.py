"""Settings: of this installation (environment variables `GNOME_...`, a `gnome.toml`), and of one round.

`GNOME_DATABASE_URL` names the database; models and reports of its rounds lie in `GNOME_FOLDER`, by default beside it.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from platformdirs import user_data_path
from pydantic import Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from gnome.database.engine import sqlite_path
from gnome.errors import InvalidInput
from gnome.processes import usable_cores

GENERATORS = ("structural", "compositional", "both")
ACQUISITIONS = ("stability", "greedy")
PRECISIONS = ("fp32", "bf16", "fp8")
AUTOMATIC = "auto"
LOOKED_AGAIN_PER_EVALUATION, SCREENED_PER_EVALUATION = 10, 3
"""What the looks of `pipelines.cascade` keep; named here too because settings must not wait for torch."""


class Settings(BaseSettings):
    """What one installation needs to know; each field is `GNOME_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix="GNOME_", toml_file="gnome.toml", extra="forbid")

    database_url: str = ""
    folder: Path | None = None
    evaluator: str = "chgnet"
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    workers: int = Field(default_factory=lambda: min(usable_cores(), 256), ge=1, le=256)
    evaluation_seconds: float = Field(default=900.0, gt=0, le=1e8, allow_inf_nan=False)
    evaluation_memory_gb: float = Field(default=2.0, gt=0, le=1e6, allow_inf_nan=False)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Options first, then the environment, then `gnome.toml` in the working folder."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def database(self) -> str:
        """URL of the database; by default a SQLite file in the user's data folder."""
        return self.database_url or f"sqlite:///{user_data_path('gnome') / 'gnome.db'}"

    @property
    def data_folder(self) -> Path:
        """Where models and references are kept: `folder`, else `NAME.files` beside a SQLite file, else in the user's data folder."""
        if self.folder is not None:
            try:
                return self.folder.expanduser().absolute()
            except RuntimeError:
                raise InvalidInput(f"folder {self.folder}: there is no such user") from None
        path = sqlite_path(self.database)
        return user_data_path("gnome") if path is None else path.with_suffix(".files")


def refuse_misspelt_variables(names: Iterable[str]) -> None:
    """Raise InvalidInput for a variable that is nearly one of ours; desktops have `GNOME_...` variables too, so others pass."""
    ours = [f"GNOME_{field.upper()}" for field in Settings.model_fields]
    for name in sorted(set(names) - set(ours)):
        if name.startswith("GNOME_") and (meant := get_close_matches(name, ours, n=1, cutoff=0.85)):
            raise InvalidInput(f"the environment variable {name} is no setting; did you mean {meant[0]}?")


def parse_elements(text: str) -> tuple[str, ...]:
    """Read a chemical system as it is commonly written: Li-Fe-P-O, or symbols with commas or spaces between them.

    Raises InvalidInput where a symbol is missing or comes twice.
    """
    symbols = re.split(r"\s*[-,]\s*|\s+", text.strip())
    if not all(symbols):
        raise InvalidInput(f"--elements {text!r}, expected symbols with a dash or comma between them, as in Li-Fe-O")
    if len(set(symbols)) < len(symbols):
        raise InvalidInput(f"--elements {text!r}: a symbol comes twice")
    return tuple(symbols)


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """What one round does; kept with the round, so that an interrupted one goes on as it began.

    `elements`: symbols that candidates may consist of; all when empty.  `n_candidates` are proposed; the best `n_looked_again` compositions
    of a first look are looked at again where there is a `second_look`, and the best `n_screened` of the last look get the full filter (all
    members at `n_scales` volumes between two factors, at their middle where there is one; the mean or the lowest counts, see
    `ScreeningSettings`).  Both numbers are in proportion to `budget`, the number of candidates evaluated, unless given; see
    `pipelines.cascade` for what goes on.
    Limits count attempts, never seconds.
    `acquisition`: which of them first, those most probably stable or those predicted deepest below the hull; whichever, what
    `pipelines.standing` doubts goes last.  `formula_check`: whether the compositional ensemble may doubt.  `charge_balanced`: whether
    substitutions that unbalance charges are left out.
    `n_formulas` and `structures_per_formula` are the compositional pipeline's.  `max_atoms` bounds a candidate's cell.
    """

    generator: str = "structural"
    elements: tuple[str, ...] = ()
    evaluator: str = "chgnet"
    n_candidates: int = 6000
    n_looked_again: int = None  # type: ignore[assignment] # until __post_init__ has seen the budget
    n_screened: int = None  # type: ignore[assignment]
    second_look: bool = True
    budget: int = 60
    seed: int = 0
    n_scales: int = 1
    smallest_scale: float = 0.9
    largest_scale: float = 1.1
    over_volumes: Literal["mean", "lowest"] = "mean"
    acquisition: str = "stability"
    formula_check: bool = True
    charge_balanced: bool = True
    max_atoms: int = 20
    n_formulas: int = 16
    structures_per_formula: int = 20

    def __post_init__(self) -> None:
        """Fill in what is in proportion to the budget, and refuse what no round can do."""
        given = vars(self)
        if given["n_screened"] is None:
            object.__setattr__(self, "n_screened", max(1, SCREENED_PER_EVALUATION * self.budget))
        if given["n_looked_again"] is None:
            object.__setattr__(self, "n_looked_again", max(LOOKED_AGAIN_PER_EVALUATION * self.budget, self.n_screened))
        if self.generator not in GENERATORS:
            raise InvalidInput(f"generator {self.generator!r}, expected one of {', '.join(GENERATORS)}")
        if self.acquisition not in ACQUISITIONS:
            raise InvalidInput(f"acquisition {self.acquisition!r}, expected {' or '.join(ACQUISITIONS)}")
        if not 0 <= self.seed < 2**62:
            raise InvalidInput(f"seed is {self.seed}, expected 0 to 2^62")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and field.name != "seed" and value < 1:
                raise InvalidInput(f"{field.name} is {value}, expected 1 or more")
        if self.n_looked_again < self.n_screened:
            raise InvalidInput(f"n_looked_again is {self.n_looked_again}, expected at least n_screened, {self.n_screened}")

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The pipelines that propose."""
        return ("structural", "compositional") if self.generator == "both" else (self.generator,)

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return {**asdict(self), "elements": list(self.elements)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Self:
        """Rebuild what `to_dict` gave."""
        return cls(**{**stored, "elements": tuple(stored["elements"])})


@dataclass(frozen=True, kw_only=True)
class CampaignSettings:
    """`rounds` to run; the ensemble learns once `retrain_after` converged evaluations are new to it, in `precision`.

    That is fp32, bf16, fp8 or auto: on a GPU that in which the ensemble in use was trained, fp32 on a CPU.
    """

    rounds: int = 3
    retrain_after: int = 80
    precision: str = AUTOMATIC

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.rounds < 1 or self.retrain_after < 1:
            raise InvalidInput(f"rounds is {self.rounds} and retrain_after {self.retrain_after}, expected 1 or more")
        if self.precision not in {AUTOMATIC, *PRECISIONS}:
            raise InvalidInput(f"precision {self.precision!r}, expected {AUTOMATIC}, {', '.join(PRECISIONS)}")
