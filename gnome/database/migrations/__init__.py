"""Steps from one form of the tables to the next, run by Alembic when a database is opened.

A change of `gnome.database.schema` comes with a file in `versions` and a new `HEAD`.
"""
