"""The tables.

    methods ---< crystals >--- crystal_elements          rounds ---< ledger
                  |    ^                                  leases
                  |    | crystal_id
    candidates <--+    evaluations >--- candidates ---< predictions >--- models
        | parent_id -> crystals.id                        seedings

A crystal found by a round points at its candidate, the candidate at the crystal it was made from: that is its lineage.  Energies are
eV/atom.  The CHECK constraints are the last gate before a number can reach a hull: bounds are written as BETWEEN, which refuses
infinities on both databases and NaN on PostgreSQL (where NaN is greater than any number); SQLite turns NaN into NULL, which NOT NULL
refuses.  Times are seconds since 1970 by the database's clock.  Texts compare byte by byte on both databases.

A change here needs a migration beside it (`migrations/versions`); the tests compare the two.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeEngine

from gnome.database.clock import database_time
from gnome.quantities import PLAUSIBLE_E_FORM

HEAD = "0005"
"""The newest migration; a database at another revision is older or newer than this program."""

MAX_RAW_ENERGY = 100_000.0
"""eV/atom: raw energies of pseudopotential codes reach some 10,000 (Quantum ESPRESSO counts semicore electrons); 1e6 is a mistake."""

ORIGINS = ("seed", "discovered", "imported")
"""Where a crystal may come from."""

_LOW, _HIGH = PLAUSIBLE_E_FORM
_RANGE = _HIGH - _LOW

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _text() -> TypeEngine[str]:
    return Text().with_variant(Text(collation="C"), "postgresql")


def _json() -> TypeEngine[Any]:
    return JSON(none_as_null=True)


def _between(column: str, low: float, high: float, *, name: str | None = None) -> CheckConstraint:
    return CheckConstraint(f"{column} BETWEEN {low!r} AND {high!r}", name=name or f"{column}_range")


def _one_of(column: str, *values: str) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=f"{column}_known")


def _one_where(name: str, column: Column[str], condition: ColumnElement[bool]) -> Index:
    """At most one row for each value of the column among those that meet the condition."""
    return Index(name, column, unique=True, sqlite_where=condition, postgresql_where=condition)


methods = Table(
    "methods",
    metadata,
    Column("label", _text(), primary_key=True),
    Column("definition", _json(), nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("state", _text(), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("settings", _json(), nullable=False),
    Column("summary", _json()),
    Column("started_at", Double, nullable=False, default=database_time()),
    Column("finished_at", Double),
    _one_of("state", "running", "finished", "failed"),
)
_one_where("one_running_round", rounds.c.state, rounds.c.state == "running")

models = Table(
    "models",
    metadata,
    Column("id", _text(), primary_key=True),
    Column("kind", _text(), nullable=False),
    Column("parent_id", _text(), ForeignKey("models.id")),
    Column("status", _text(), nullable=False),
    Column("path", _text(), nullable=False),
    Column("sha256", _text(), nullable=False),
    Column("card", _json(), nullable=False),
    Column("metrics", _json(), nullable=False),
    Column("round", Integer, ForeignKey("rounds.number")),
    Column("created_at", Double, nullable=False, default=database_time()),
    Column("promoted_at", Double),
    _one_of("kind", "structural", "compositional"),
    _one_of("status", "candidate", "promoted", "retired"),
)
_one_where("one_promoted_model", models.c.kind, models.c.status == "promoted")
"""`promoted_at`: since when a model is in use, or was last; none where it never was, or was taken back."""

candidates = Table(
    "candidates",
    metadata,
    Column("id", _text(), primary_key=True),
    Column("round", Integer, ForeignKey("rounds.number"), nullable=False, index=True),
    Column("generator", _text(), nullable=False),
    Column("parent_id", _text(), index=True),
    Column("parameters", _json(), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("structure", _json(), nullable=False),
    Column("reduced_formula", _text(), nullable=False, index=True),
    Column("n_atoms", Integer, nullable=False),
    _between("n_atoms", 1, 100_000),
)

crystals = Table(
    "crystals",
    metadata,
    Column("key", Integer, primary_key=True),
    Column("id", _text(), nullable=False),
    Column("method", _text(), ForeignKey("methods.label"), nullable=False),
    Column("reduced_formula", _text(), nullable=False, index=True),
    Column("chemical_formula_reduced", _text(), nullable=False, index=True),
    Column("chemical_formula_anonymous", _text(), nullable=False),
    Column("chemical_system", _text(), nullable=False, index=True),
    Column("n_elements", Integer, nullable=False),
    Column("n_atoms", Integer, nullable=False),
    Column("volume_per_atom", Double, nullable=False),
    Column("space_group_number", Integer),
    Column("protostructure", _text(), index=True),
    Column("fingerprint", _text(), nullable=False, index=True),
    Column("structure", _json(), nullable=False),
    Column("energy_per_atom", Double),
    Column("correction_per_atom", Double, nullable=False),
    Column("correction_scheme", _text(), nullable=False),
    Column("correction_version", _text(), nullable=False),
    Column("e_form_per_atom", Double, nullable=False),
    Column("e_above_hull", Double, index=True),
    Column("decomposition_energy", Double),
    Column("decomposes_to", _json()),
    Column("origin", _text(), nullable=False),
    Column("round", Integer, ForeignKey("rounds.number"), index=True),
    Column("candidate_id", _text(), ForeignKey("candidates.id"), index=True),
    Column("source", _text(), nullable=False),
    Column("created_at", Double, nullable=False, default=database_time()),
    Column("versions", _json()),
    Column("n_competing", Integer),
    Column("p_stable", Double),
    Column("formula_check", Double),
    UniqueConstraint("id", "method"),
    _one_of("origin", *ORIGINS),
    _between("n_elements", 1, 103),
    _between("n_atoms", 1, 100_000),
    _between("volume_per_atom", 0.1, 10_000.0),
    _between("space_group_number", 1, 230),
    _between("energy_per_atom", -MAX_RAW_ENERGY, MAX_RAW_ENERGY),
    _between("correction_per_atom", -MAX_RAW_ENERGY, MAX_RAW_ENERGY),
    _between("e_form_per_atom", _LOW, _HIGH),
    _between("e_above_hull", 0.0, _RANGE),
    _between("decomposition_energy", -_RANGE, _RANGE),
    _between("n_competing", 0, 1_000_000_000),
    _between("p_stable", 0.0, 1.0),
    _between("formula_check", 0.0, 1.0),
)
"""`n_competing` follows the hull; `p_stable` and `formula_check` are what the round that found the crystal expected of it."""

crystal_elements = Table(
    "crystal_elements",
    metadata,
    Column("element", _text(), primary_key=True),
    Column("crystal_key", Integer, ForeignKey("crystals.key", ondelete="CASCADE"), primary_key=True, index=True),
    Column("amount", Integer, nullable=False),
    _between("amount", 1, 100_000),
    sqlite_with_rowid=False,
)
"""Which elements a crystal has, and how many atoms of each in its cell."""

predictions = Table(
    "predictions",
    metadata,
    Column("candidate_id", _text(), ForeignKey("candidates.id"), primary_key=True),
    Column("model_id", _text(), ForeignKey("models.id"), primary_key=True),
    Column("e_form_per_atom", Double, nullable=False),
    Column("spread", Double, nullable=False),
    Column("volume_scale", Double, nullable=False),
    Column("decomposition_energy", Double),
    Column("p_stable", Double),
    Column("n_competing", Integer),
    Column("formula_check", Double),
    _between("e_form_per_atom", -MAX_RAW_ENERGY, MAX_RAW_ENERGY),
    _between("spread", 0.0, MAX_RAW_ENERGY),
    _between("volume_scale", 0.01, 100.0),
    _between("decomposition_energy", -MAX_RAW_ENERGY, MAX_RAW_ENERGY),
    _between("p_stable", 0.0, 1.0),
    _between("n_competing", 0, 1_000_000_000),
    _between("formula_check", 0.0, 1.0),
)
"""What an ensemble said; wide bounds, since a bad prediction is worth keeping and reaches no hull."""

evaluations = Table(
    "evaluations",
    metadata,
    Column("candidate_id", _text(), ForeignKey("candidates.id"), primary_key=True),
    Column("method", _text(), ForeignKey("methods.label"), primary_key=True),
    Column("round", Integer, ForeignKey("rounds.number"), nullable=False, index=True),
    Column("converged", Boolean(create_constraint=True, name="converged_boolean"), nullable=False),
    Column("failure", _text()),
    Column("message", _text(), nullable=False),
    Column("crystal_id", _text()),
    Column("energy_per_atom", Double),
    Column("correction_per_atom", Double),
    Column("e_form_per_atom", Double),
    Column("e_above_hull_before", Double),
    Column("novel", Boolean(create_constraint=True, name="novel_boolean")),
    Column("max_force", Double),
    Column("n_steps", Integer, nullable=False),
    Column("cost_seconds", Double, nullable=False),
    Column("forces", _json()),
    Column("stress", _json()),
    Column("magnetic_moments", _json()),
    Column("created_at", Double, nullable=False, default=database_time()),
    Column("versions", _json()),
    Column("structure", _json()),
    Column("attempts", Integer, nullable=False, server_default="1"),
    ForeignKeyConstraint(["crystal_id", "method"], ["crystals.id", "crystals.method"]),
    Index("ix_evaluations_crystal", "crystal_id", "method"),
    CheckConstraint(
        "(converged AND failure IS NULL AND e_form_per_atom IS NOT NULL AND energy_per_atom IS NOT NULL) "
        "OR (NOT converged AND failure IS NOT NULL)",
        name="failure_or_energy",
    ),
    _between("energy_per_atom", -MAX_RAW_ENERGY, MAX_RAW_ENERGY),
    _between("correction_per_atom", -MAX_RAW_ENERGY, MAX_RAW_ENERGY),
    _between("e_form_per_atom", _LOW, _HIGH),
    _between("e_above_hull_before", -_RANGE, _RANGE),
    _between("n_steps", 0, 1_000_000_000),
    _between("cost_seconds", 0.0, 1e10),
    _between("attempts", 1, 1_000_000_000),
)
"""Every answer of an evaluator.

`structure` is the relaxed one; `e_above_hull_before` the signed distance to the hull as it stood before the round; `cost_seconds` that of
all attempts.
"""

seedings = Table(
    "seedings",
    metadata,
    Column("method", _text(), ForeignKey("methods.label"), primary_key=True),
    Column("digest", _text(), primary_key=True),
    Column("created_at", Double, nullable=False, default=database_time()),
)
"""Which shipped seeds a method has been given, by the digest of their file."""

ledger = Table(
    "ledger",
    metadata,
    Column("round", Integer, ForeignKey("rounds.number"), primary_key=True),
    Column("stage", _text(), primary_key=True),
    Column("shard", Integer, primary_key=True),
    Column("state", _text(), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("owner", _text()),
    Column("lease_until", Double),
    Column("result", _json()),
    Column("message", _text()),
    _one_of("state", "pending", "running", "done", "failed"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", _text(), primary_key=True),
    Column("token", BigInteger, nullable=False),
    Column("owner", _text()),
    Column("lease_until", Double),
)
"""Who may run a round; `token` grows with every new holder, so that a former one is told apart."""
