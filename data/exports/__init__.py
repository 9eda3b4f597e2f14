"""Pools in other formats: writing them for libraries that know nothing of lsmix, and reading two of them back."""
