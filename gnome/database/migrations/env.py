"""Run by Alembic: applies the steps over the connection that `gnome.database.upgrade` hands in, inside its transaction."""

from alembic import context

from gnome.database.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
