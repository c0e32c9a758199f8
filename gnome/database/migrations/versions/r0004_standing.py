"""Keep what stands beside a predicted energy, how often an evaluation was tried, and which seeds were given; drop counts nobody read."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_COLUMNS = (
    ("crystals", "n_competing", "INTEGER", "0 AND 1000000000"),
    ("crystals", "p_stable", "DOUBLE", "0.0 AND 1.0"),
    ("crystals", "formula_check", "DOUBLE", "0.0 AND 1.0"),
    ("predictions", "p_stable", "DOUBLE", "0.0 AND 1.0"),
    ("predictions", "n_competing", "INTEGER", "0 AND 1000000000"),
    ("predictions", "formula_check", "DOUBLE", "0.0 AND 1.0"),
    ("evaluations", "attempts", "INTEGER DEFAULT 1 NOT NULL", "1 AND 1000000000"),
)


def upgrade() -> None:
    """Add the columns, each with its bounds: SQLite takes a constraint with a new column, but not by itself."""
    double = "DOUBLE PRECISION" if op.get_bind().dialect.name == "postgresql" else "DOUBLE"
    for table, column, kind, bounds in _COLUMNS:
        op.execute(
            f"ALTER TABLE {table} ADD COLUMN {column} {double if kind == 'DOUBLE' else kind} "
            f"CONSTRAINT ck_{table}_{column}_range CHECK ({column} BETWEEN {bounds})"
        )
    collation = ' COLLATE "C"' if op.get_bind().dialect.name == "postgresql" else ""
    op.execute(
        f"CREATE TABLE seedings (method TEXT{collation} NOT NULL, digest TEXT{collation} NOT NULL, created_at {double} NOT NULL, "
        "CONSTRAINT pk_seedings PRIMARY KEY (method, digest), "
        "CONSTRAINT fk_seedings_method FOREIGN KEY(method) REFERENCES methods (label))"
    )
    op.drop_table("formula_runs")
