"""Data sets of image files: listing them, and decoding them to rows of one size."""
