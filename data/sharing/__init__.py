"""Moving artifacts: push, pull, and local copies of what is stored at a URL."""
