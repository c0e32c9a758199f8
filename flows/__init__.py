"""The round, its retraining and its campaigns: plain Python stages, Prefect around them, the command line on top."""
