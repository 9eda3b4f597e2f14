"""Make lsmix importable for a Python that has its own torch, without an environment, a package index or a network.

``python -m benchmarks.gpu_packages FOLDER [WHEELS]`` fills a folder for PYTHONPATH: a link ``lsmix`` to this checkout,
the metadata for ``importlib.metadata``, and the packages of the wheels in the folder WHEELS.
"""

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["main", "prepare"]

_ROOT = Path(__file__).resolve().parents[1]


def prepare(folder: Path, wheels: Path | None = None) -> None:
    """Fill the folder; packages from an earlier call are replaced.

    Raises:
        SystemExit: There are no wheels, or pip cannot install them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if wheels is not None:
        _install(folder, wheels)
    link = folder / "lsmix"
    link.unlink(missing_ok=True)
    link.symlink_to(_ROOT, target_is_directory=True)
    found = re.search(r'^__version__ = "(.+)"$', (_ROOT / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    version = found[1] if found else "0"
    metadata = folder / f"lsmix-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: lsmix\nVersion: {version}\n"
    (metadata / "METADATA").write_text(text, encoding="utf-8")


def _install(folder: Path, wheels: Path) -> None:
    found = [str(path) for path in sorted(wheels.glob("*.whl")) if not path.name.startswith("lsmix-")]
    if not found:
        sys.exit(f"No wheels (*.whl) in the folder {str(wheels)!r} given as WHEELS.")
    options = ["--quiet", "--no-index", "--no-deps", "--find-links", str(wheels), "--upgrade", "--target", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *found], check=False)
    if done.returncode:
        sys.exit(f"pip could not install the wheels in {str(wheels)!r}. See its messages above.")


def main(words: list[str]) -> None:
    """Run the command line."""
    if not 1 <= len(words) <= 2:
        sys.exit("usage: python -m benchmarks.gpu_packages FOLDER [WHEELS]")
    prepare(Path(words[0]), Path(words[1]) if len(words) == 2 else None)


if __name__ == "__main__":
    main(sys.argv[1:])
