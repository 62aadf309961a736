"""What the tests stand on: images made by other tools, a private node, a census of the host."""
