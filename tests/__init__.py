"""Tests that need a whole node: the walls by name, and the user's day from end to end."""
