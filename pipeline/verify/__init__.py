"""Verifying pools against their plan and rebuilding them."""
