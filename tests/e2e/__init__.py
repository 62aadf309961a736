"""The user's day: real SDK, real command line, real node."""
