"""Artifacts in other places: fetching, pushing and pulling, and pools read from a URL."""
