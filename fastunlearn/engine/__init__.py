"""`Unlearner`: stores, feeds and draws on the device, and the step as one replayed graph."""
