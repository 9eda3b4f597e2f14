"""The report of a recipe, section by section."""
