"""Shoal inside other people's frameworks, judged by these frameworks' own suites."""
