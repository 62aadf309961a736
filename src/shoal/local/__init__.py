"""What a client on the node's own machine can do: start the node, build `base`, look at the host."""
