"""The report of a recipe: one module a chapter."""
