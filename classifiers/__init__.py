"""Classifiers, their augmentation and their training loop. Knows nothing of flows, stages and Dask."""
