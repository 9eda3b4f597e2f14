"""Recipes, the configuration of each stage, and the results that stages write."""
