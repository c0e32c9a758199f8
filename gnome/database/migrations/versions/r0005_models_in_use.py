"""Keep since when each model is, or was last, the one in use, so that the one before it can be found."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; of the models that are there, those were in use that are, that came with the program, or that another came from."""
    op.add_column("models", sa.Column("promoted_at", sa.Double(), nullable=True))
    op.execute(
        "UPDATE models SET promoted_at = created_at WHERE status = 'promoted' OR (status = 'retired' AND (path LIKE 'shipped:%' "
        "OR id IN (SELECT parent_id FROM models WHERE parent_id IS NOT NULL)))"
    )
