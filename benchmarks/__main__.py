"""``python -m benchmarks [NAME …]``: run the named benchmarks (default: all), and write a page with the results.

``python -m benchmarks gpu``, ``gpu-evidence``, ``sheets`` and ``desk`` have options; see their ``--help``.
"""

import importlib
import sys
import time

_NAMES = ("start", "glow", "mix", "stream", "train", "scaling", "executors", "scheduler", "export", "memory")
_MORE = ("one_core", "waiting")  # run only when named

_COMMANDS = {"gpu": "gpu", "gpu-evidence": "evidence", "sheets": "sheets", "desk": "desk"}  # programs with options


def main() -> None:
    """Run the benchmarks named on the command line."""
    if sys.argv[1:2] and sys.argv[1] in _COMMANDS:
        sys.exit(importlib.import_module(f"benchmarks.{_COMMANDS[sys.argv[1]]}").main(sys.argv[2:]))
    names = sys.argv[1:] or list(_NAMES)
    unknown = [name for name in names if name not in (*_NAMES, *_MORE, "page")]
    if unknown:
        sys.exit(
            f"Unknown benchmark {unknown[0]!r}. Known: {', '.join((*_NAMES, *_MORE))}, and 'page' for only the page."
        )
    for name in names:
        begun = time.monotonic()
        if name != "page":
            importlib.import_module(f"benchmarks.{name}").run()
            print(f"\n{name}: {time.monotonic() - begun:.0f} s", flush=True)
    importlib.import_module("benchmarks.page").write()


if __name__ == "__main__":  # contender processes import this module, too
    main()
