"""Whole unlearning steps: the networks, the contestants, what each of them costs.

`bench_step.py` lets them take turns.
"""
