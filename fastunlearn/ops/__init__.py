"""The ops: one file each, with schema, fake kernel, autograd, the eager closed form and the choice of
backend.
"""
