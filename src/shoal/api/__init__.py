"""The control plane over HTTP: bodies in, nouns out, every error a problem."""
