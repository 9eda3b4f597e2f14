"""``python -m benchmarks [NAME …]``: measure, print and save; all of them without a name."""

import importlib
import sys

_NAMES = ("stream", "glow", "export")


def main() -> None:
    """Run the benchmarks that are named on the command line."""
    names = sys.argv[1:] or list(_NAMES)
    unknown = [name for name in names if name not in _NAMES]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r}; there are {', '.join(_NAMES)}")
    for name in names:
        importlib.import_module(f"benchmarks.{name}").run()


main()
