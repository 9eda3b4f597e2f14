"""Loaders that stream batches of pools and arrays to a training loop."""
