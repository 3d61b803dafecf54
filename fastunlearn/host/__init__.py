"""What a library needs of its machine, and what knows nothing of unlearning.

Checks, files, locks, rows on disk, random numbers, precision.
"""
