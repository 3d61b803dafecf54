"""What was forgotten and what was kept, in numbers; one file a metric."""
