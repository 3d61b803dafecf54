"""One unlearning step: draw, compose, predict, residual, combine, update. Begin with `take.py`."""
