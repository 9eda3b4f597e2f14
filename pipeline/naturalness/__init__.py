"""Measures of how natural mixed images are."""
