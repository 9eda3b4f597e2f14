"""Sharing of artifacts: push, pull, and local copies of remote artifacts."""
