"""Classifiers, augmentation, mixing in pixel space, and the training loop."""
