"""The walls, judged from inside a sandbox and from the host; a name carries the property's id."""
