"""Recipes, artifacts, cache keys, stages, executors and the report. Only ``cli_options`` imports click."""
