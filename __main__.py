"""``python -m lsmix`` is the command ``lsmix``."""

from lsmix.cli import main

if __name__ == "__main__":
    main()
