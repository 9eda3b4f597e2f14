"""Recipe, artifacts and their keys, stages, executors, report. Knows nothing of click."""
