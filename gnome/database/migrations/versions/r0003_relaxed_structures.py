"""Keep the relaxed structure with each evaluation, so that it is there before it is known whether the crystal is new."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; evaluations that are there have none."""
    op.add_column("evaluations", sa.Column("structure", sa.JSON(none_as_null=True), nullable=True))
