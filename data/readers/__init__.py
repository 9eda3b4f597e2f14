"""Readers of published data sets, with one module per format."""
