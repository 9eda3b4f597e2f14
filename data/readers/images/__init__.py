"""Readers of data sets of image files, which list the files and decode them to arrays of one size."""
