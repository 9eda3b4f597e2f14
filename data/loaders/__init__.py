"""Loaders that stream the rows of pools and arrays to a training loop."""
