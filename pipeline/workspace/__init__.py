"""Workspaces: where artifacts are stored, found, locked and removed."""
