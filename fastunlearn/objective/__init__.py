"""What a step is made of.

The noise schedule, draws, bands of frequencies, terms and passes, and how two gradients become one.
"""
