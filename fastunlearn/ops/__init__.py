"""The ops, one file each: schema, fake kernel, autograd, eager closed form, choice of backend."""
