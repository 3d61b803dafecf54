"""Input factories and error budgets, shared by `tests/` and `bench/`. Not part of the public API."""
