"""The papers' settings, one file an experiment."""
