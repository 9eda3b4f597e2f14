"""The HTML report of a recipe, one module per group of sections."""
