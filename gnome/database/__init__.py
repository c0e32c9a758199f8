"""The database of crystals, evaluations, models and rounds, and its query language."""
