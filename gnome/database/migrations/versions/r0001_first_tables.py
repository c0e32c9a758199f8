"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
JSON = sa.JSON(none_as_null=True)


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "leases",
        sa.Column("name", TEXT, nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("owner", TEXT, nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
    )
    op.create_table(
        "methods",
        sa.Column("label", TEXT, nullable=False),
        sa.Column("definition", JSON, nullable=False),
        sa.PrimaryKeyConstraint("label", name=op.f("pk_methods")),
    )
    op.create_table(
        "rounds",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("settings", JSON, nullable=False),
        sa.Column("summary", JSON, nullable=True),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.CheckConstraint("state IN ('running', 'finished', 'failed')", name=op.f("ck_rounds_state_known")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_rounds")),
    )
    op.create_index(
        "one_running_round",
        "rounds",
        ["state"],
        unique=True,
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_table(
        "candidates",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("generator", TEXT, nullable=False),
        sa.Column("parent_id", TEXT, nullable=True),
        sa.Column("parameters", JSON, nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("structure", JSON, nullable=False),
        sa.Column("reduced_formula", TEXT, nullable=False),
        sa.Column("n_atoms", sa.Integer(), nullable=False),
        sa.CheckConstraint("n_atoms BETWEEN 1 AND 100000", name=op.f("ck_candidates_n_atoms_range")),
        sa.ForeignKeyConstraint(["round"], ["rounds.number"], name=op.f("fk_candidates_round")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_candidates")),
    )
    op.create_index(op.f("ix_candidates_parent_id"), "candidates", ["parent_id"], unique=False)
    op.create_index(op.f("ix_candidates_reduced_formula"), "candidates", ["reduced_formula"], unique=False)
    op.create_index(op.f("ix_candidates_round"), "candidates", ["round"], unique=False)
    op.create_table(
        "formula_runs",
        sa.Column("reduced_formula", TEXT, nullable=False),
        sa.Column("method", TEXT, nullable=False),
        sa.Column("attempted", sa.Integer(), nullable=False),
        sa.Column("completed", sa.Integer(), nullable=False),
        sa.CheckConstraint("0 <= completed AND completed <= attempted", name=op.f("ck_formula_runs_completed_range")),
        sa.ForeignKeyConstraint(["method"], ["methods.label"], name=op.f("fk_formula_runs_method")),
        sa.PrimaryKeyConstraint("reduced_formula", "method", name=op.f("pk_formula_runs")),
    )
    op.create_table(
        "ledger",
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("stage", TEXT, nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("owner", TEXT, nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("result", JSON, nullable=True),
        sa.Column("message", TEXT, nullable=True),
        sa.CheckConstraint("state IN ('pending', 'running', 'done', 'failed')", name=op.f("ck_ledger_state_known")),
        sa.ForeignKeyConstraint(["round"], ["rounds.number"], name=op.f("fk_ledger_round")),
        sa.PrimaryKeyConstraint("round", "stage", "shard", name=op.f("pk_ledger")),
    )
    op.create_table(
        "models",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("parent_id", TEXT, nullable=True),
        sa.Column("status", TEXT, nullable=False),
        sa.Column("path", TEXT, nullable=False),
        sa.Column("sha256", TEXT, nullable=False),
        sa.Column("card", JSON, nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("round", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("kind IN ('structural', 'compositional')", name=op.f("ck_models_kind_known")),
        sa.CheckConstraint("status IN ('candidate', 'promoted', 'retired')", name=op.f("ck_models_status_known")),
        sa.ForeignKeyConstraint(["parent_id"], ["models.id"], name=op.f("fk_models_parent_id")),
        sa.ForeignKeyConstraint(["round"], ["rounds.number"], name=op.f("fk_models_round")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models")),
    )
    op.create_index(
        "one_promoted_model",
        "models",
        ["kind"],
        unique=True,
        sqlite_where=sa.text("status = 'promoted'"),
        postgresql_where=sa.text("status = 'promoted'"),
    )
    op.create_table(
        "crystals",
        sa.Column("key", sa.Integer(), nullable=False),
        sa.Column("id", TEXT, nullable=False),
        sa.Column("method", TEXT, nullable=False),
        sa.Column("reduced_formula", TEXT, nullable=False),
        sa.Column("chemical_formula_reduced", TEXT, nullable=False),
        sa.Column("chemical_formula_anonymous", TEXT, nullable=False),
        sa.Column("chemical_system", TEXT, nullable=False),
        sa.Column("n_elements", sa.Integer(), nullable=False),
        sa.Column("n_atoms", sa.Integer(), nullable=False),
        sa.Column("volume_per_atom", sa.Double(), nullable=False),
        sa.Column("space_group_number", sa.Integer(), nullable=True),
        sa.Column("protostructure", TEXT, nullable=True),
        sa.Column("fingerprint", TEXT, nullable=False),
        sa.Column("structure", JSON, nullable=False),
        sa.Column("energy_per_atom", sa.Double(), nullable=True),
        sa.Column("correction_per_atom", sa.Double(), nullable=False),
        sa.Column("correction_scheme", TEXT, nullable=False),
        sa.Column("correction_version", TEXT, nullable=False),
        sa.Column("e_form_per_atom", sa.Double(), nullable=False),
        sa.Column("e_above_hull", sa.Double(), nullable=True),
        sa.Column("decomposition_energy", sa.Double(), nullable=True),
        sa.Column("decomposes_to", JSON, nullable=True),
        sa.Column("origin", TEXT, nullable=False),
        sa.Column("round", sa.Integer(), nullable=True),
        sa.Column("candidate_id", TEXT, nullable=True),
        sa.Column("source", TEXT, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("origin IN ('seed', 'discovered', 'imported')", name=op.f("ck_crystals_origin_known")),
        sa.CheckConstraint(
            "correction_per_atom BETWEEN -100000.0 AND 100000.0", name=op.f("ck_crystals_correction_per_atom_range")
        ),
        sa.CheckConstraint("decomposition_energy BETWEEN -11.0 AND 11.0", name=op.f("ck_crystals_decomposition_energy_range")),
        sa.CheckConstraint("e_above_hull BETWEEN 0.0 AND 11.0", name=op.f("ck_crystals_e_above_hull_range")),
        sa.CheckConstraint("e_form_per_atom BETWEEN -6.0 AND 5.0", name=op.f("ck_crystals_e_form_per_atom_range")),
        sa.CheckConstraint("energy_per_atom BETWEEN -100000.0 AND 100000.0", name=op.f("ck_crystals_energy_per_atom_range")),
        sa.CheckConstraint("n_atoms BETWEEN 1 AND 100000", name=op.f("ck_crystals_n_atoms_range")),
        sa.CheckConstraint("n_elements BETWEEN 1 AND 103", name=op.f("ck_crystals_n_elements_range")),
        sa.CheckConstraint("space_group_number BETWEEN 1 AND 230", name=op.f("ck_crystals_space_group_number_range")),
        sa.CheckConstraint("volume_per_atom BETWEEN 0.1 AND 10000.0", name=op.f("ck_crystals_volume_per_atom_range")),
        sa.ForeignKeyConstraint(["candidate_id"], ["candidates.id"], name=op.f("fk_crystals_candidate_id")),
        sa.ForeignKeyConstraint(["method"], ["methods.label"], name=op.f("fk_crystals_method")),
        sa.ForeignKeyConstraint(["round"], ["rounds.number"], name=op.f("fk_crystals_round")),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_crystals")),
        sa.UniqueConstraint("id", "method", name=op.f("uq_crystals_id_method")),
    )
    op.create_index(op.f("ix_crystals_candidate_id"), "crystals", ["candidate_id"], unique=False)
    op.create_index(op.f("ix_crystals_chemical_formula_reduced"), "crystals", ["chemical_formula_reduced"], unique=False)
    op.create_index(op.f("ix_crystals_chemical_system"), "crystals", ["chemical_system"], unique=False)
    op.create_index(op.f("ix_crystals_e_above_hull"), "crystals", ["e_above_hull"], unique=False)
    op.create_index(op.f("ix_crystals_fingerprint"), "crystals", ["fingerprint"], unique=False)
    op.create_index(op.f("ix_crystals_protostructure"), "crystals", ["protostructure"], unique=False)
    op.create_index(op.f("ix_crystals_reduced_formula"), "crystals", ["reduced_formula"], unique=False)
    op.create_index(op.f("ix_crystals_round"), "crystals", ["round"], unique=False)
    op.create_table(
        "predictions",
        sa.Column("candidate_id", TEXT, nullable=False),
        sa.Column("model_id", TEXT, nullable=False),
        sa.Column("e_form_per_atom", sa.Double(), nullable=False),
        sa.Column("spread", sa.Double(), nullable=False),
        sa.Column("volume_scale", sa.Double(), nullable=False),
        sa.Column("decomposition_energy", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "decomposition_energy BETWEEN -100000.0 AND 100000.0", name=op.f("ck_predictions_decomposition_energy_range")
        ),
        sa.CheckConstraint("e_form_per_atom BETWEEN -100000.0 AND 100000.0", name=op.f("ck_predictions_e_form_per_atom_range")),
        sa.CheckConstraint("spread BETWEEN 0.0 AND 100000.0", name=op.f("ck_predictions_spread_range")),
        sa.CheckConstraint("volume_scale BETWEEN 0.01 AND 100.0", name=op.f("ck_predictions_volume_scale_range")),
        sa.ForeignKeyConstraint(["candidate_id"], ["candidates.id"], name=op.f("fk_predictions_candidate_id")),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_predictions_model_id")),
        sa.PrimaryKeyConstraint("candidate_id", "model_id", name=op.f("pk_predictions")),
    )
    op.create_table(
        "crystal_elements",
        sa.Column("element", TEXT, nullable=False),
        sa.Column("crystal_key", sa.Integer(), nullable=False),
        sa.Column("amount", sa.Integer(), nullable=False),
        sa.CheckConstraint("amount BETWEEN 1 AND 100000", name=op.f("ck_crystal_elements_amount_range")),
        sa.ForeignKeyConstraint(
            ["crystal_key"], ["crystals.key"], name=op.f("fk_crystal_elements_crystal_key"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("element", "crystal_key", name=op.f("pk_crystal_elements")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_crystal_elements_crystal_key"), "crystal_elements", ["crystal_key"], unique=False)
    op.create_table(
        "evaluations",
        sa.Column("candidate_id", TEXT, nullable=False),
        sa.Column("method", TEXT, nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("converged", sa.Boolean(create_constraint=True, name="converged_boolean"), nullable=False),
        sa.Column("failure", TEXT, nullable=True),
        sa.Column("message", TEXT, nullable=False),
        sa.Column("crystal_id", TEXT, nullable=True),
        sa.Column("energy_per_atom", sa.Double(), nullable=True),
        sa.Column("correction_per_atom", sa.Double(), nullable=True),
        sa.Column("e_form_per_atom", sa.Double(), nullable=True),
        sa.Column("e_above_hull_before", sa.Double(), nullable=True),
        sa.Column("novel", sa.Boolean(create_constraint=True, name="novel_boolean"), nullable=True),
        sa.Column("max_force", sa.Double(), nullable=True),
        sa.Column("n_steps", sa.Integer(), nullable=False),
        sa.Column("cost_seconds", sa.Double(), nullable=False),
        sa.Column("forces", JSON, nullable=True),
        sa.Column("stress", JSON, nullable=True),
        sa.Column("magnetic_moments", JSON, nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint(
            "(converged AND failure IS NULL AND e_form_per_atom IS NOT NULL AND energy_per_atom IS NOT NULL) "
            "OR (NOT converged AND failure IS NOT NULL)",
            name=op.f("ck_evaluations_failure_or_energy"),
        ),
        sa.CheckConstraint(
            "correction_per_atom BETWEEN -100000.0 AND 100000.0", name=op.f("ck_evaluations_correction_per_atom_range")
        ),
        sa.CheckConstraint("cost_seconds BETWEEN 0.0 AND 10000000000.0", name=op.f("ck_evaluations_cost_seconds_range")),
        sa.CheckConstraint("e_above_hull_before BETWEEN -11.0 AND 11.0", name=op.f("ck_evaluations_e_above_hull_before_range")),
        sa.CheckConstraint("e_form_per_atom BETWEEN -6.0 AND 5.0", name=op.f("ck_evaluations_e_form_per_atom_range")),
        sa.CheckConstraint("energy_per_atom BETWEEN -100000.0 AND 100000.0", name=op.f("ck_evaluations_energy_per_atom_range")),
        sa.CheckConstraint("n_steps BETWEEN 0 AND 1000000000", name=op.f("ck_evaluations_n_steps_range")),
        sa.ForeignKeyConstraint(["candidate_id"], ["candidates.id"], name=op.f("fk_evaluations_candidate_id")),
        sa.ForeignKeyConstraint(
            ["crystal_id", "method"], ["crystals.id", "crystals.method"], name=op.f("fk_evaluations_crystal_id_method")
        ),
        sa.ForeignKeyConstraint(["method"], ["methods.label"], name=op.f("fk_evaluations_method")),
        sa.ForeignKeyConstraint(["round"], ["rounds.number"], name=op.f("fk_evaluations_round")),
        sa.PrimaryKeyConstraint("candidate_id", "method", name=op.f("pk_evaluations")),
    )
    op.create_index("ix_evaluations_crystal", "evaluations", ["crystal_id", "method"], unique=False)
    op.create_index(op.f("ix_evaluations_round"), "evaluations", ["round"], unique=False)
