"""``python -m benchmarks [NAME …]``: measure, print and save; all of them without a name, and a page of the results.

``python -m benchmarks gpu``, ``gpu-evidence``, ``sheets`` and ``desk`` are programs of their own: see their ``--help``.
"""

import importlib
import sys
import time

_NAMES = ("start", "glow", "mix", "stream", "train", "scaling", "executors", "scheduler", "export", "memory")
_MORE = ("one_core", "waiting")  # parts of these, to be asked for by name

_COMMANDS = {"gpu": "gpu", "gpu-evidence": "evidence", "sheets": "sheets", "desk": "desk"}  # with options of their own


def main() -> None:
    """Run the benchmarks that are named on the command line."""
    if sys.argv[1:2] and sys.argv[1] in _COMMANDS:
        sys.exit(importlib.import_module(f"benchmarks.{_COMMANDS[sys.argv[1]]}").main(sys.argv[2:]))
    names = sys.argv[1:] or list(_NAMES)
    unknown = [name for name in names if name not in (*_NAMES, *_MORE, "page")]
    if unknown:
        sys.exit(
            f"no benchmark {unknown[0]!r}; there are {', '.join((*_NAMES, *_MORE))}, and 'page' for the page alone"
        )
    for name in names:
        begun = time.monotonic()
        if name != "page":
            importlib.import_module(f"benchmarks.{name}").run()
            print(f"\n{name}: {time.monotonic() - begun:.0f} s", flush=True)
    importlib.import_module("benchmarks.page").write()


if __name__ == "__main__":  # contenders in processes of their own import this module
    main()
