"""One machine's sandboxes: what may start, how it starts, when it ends."""
