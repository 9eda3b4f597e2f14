"""Writing pools in other formats, for libraries that know nothing of lsmix."""
