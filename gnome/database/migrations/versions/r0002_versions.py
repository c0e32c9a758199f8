"""Keep with each energy the versions of the programs that gave it; a method's label does not change with them."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; rows that are there have none."""
    for table in ("crystals", "evaluations"):
        op.add_column(table, sa.Column("versions", sa.JSON(none_as_null=True), nullable=True))
