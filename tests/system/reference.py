"""Compare all arrays that the working tree produces with the arrays of a reference commit.

``python tests/system/reference.py`` runs the same recipes with the reference commit and with the working tree on the
CPU, and compares data sets, weights, latents and pools array by array: names, dtypes, shapes and every value. It prints
one line per artifact and exits with 1 if any array differs, is missing or is new.

``--keep DIR`` keeps the reference workspaces in DIR and reuses them the next time. The recipe ``cifar10-small`` needs
the real images in ``LSMIX_SHARED_DATA`` (default ``../shared/data``) and is skipped, with a message, without them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import zarr
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "cce9bf7"  # version 1, the last commit before the restructuring

# Every mixing method, on digits with a tiny flow.
METHODS = """\
format = 1
name = "methods"
[data]
format = "digits"
limit = 330
heldout = 30
test = 80
[flow]
levels = 2
steps = 2
hidden = 16
threads = 1
[flow.training]
iterations = 60
batch_size = 32
learning_rate = 1e-3
warmup = 10
flip = false
translate = 1
[latents]
chunk_rows = 64
""" + "".join(
    f'[pools.{method}]\nmethod = "{method}"\ncopies = 2\nchunk_rows = 128\n'
    for method in (
        "ls-mix",
        "linear",
        "bern-mix",
        "swap-mix",
        "reverse-mix",
        "mixup",
        "cutmix",
        "resizemix",
        "fmix",
    )
)

# Array names of the reference -> new names in the working tree.
RENAMED: dict[str, str] = {"pool.zarr/state": "pool.zarr/status"}

# Arrays of the working tree that were attributes in the reference.
NEW = {"dataset.h5/class_names"}

# Fields of recipes in the working tree -> names in the reference.
RENAMED_FIELDS = {"chunk_rows": "shard_rows"}

Arrays = dict[str, np.ndarray]


def main() -> int:
    """Run the command line; return 0 if all arrays are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default=REFERENCE, help="commit to compare with (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder in which to keep the reference workspaces")
    parser.add_argument("--only", choices=["methods", "demo", "cifar10-small"], help="run only this recipe")
    options = parser.parse_args()
    differing = 0
    with tempfile.TemporaryDirectory(prefix="lsmix-reference-") as name:
        scratch = Path(name)
        kept = options.keep.resolve() if options.keep else scratch / "reference"
        for recipe, words in _recipes(scratch):
            if options.only and recipe != options.only:
                continue
            before = kept / options.reference / recipe
            if not (before / "complete").exists():
                _run(_checkout(scratch, options.reference), _renamed(words), before)
                (before / "complete").touch()
            after = scratch / "tree" / recipe
            _run(_link(scratch, ROOT), words, after)
            differing += _compare(recipe, before, after)
    print("all arrays equal" if not differing else f"{differing} artifacts differ")
    return int(differing > 0)


def _recipes(scratch: Path) -> Iterator[tuple[str, list[str]]]:
    text = scratch / "methods.toml"
    text.write_text(METHODS)
    yield "methods", [str(text)]
    yield "demo", ["demo"]
    shared = Path(os.environ.get("LSMIX_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (shared / "unpack.py").is_file():
        print(f"cifar10-small: skipped, because there are no real images in {str(shared)!r}")
        return
    images = scratch / "images"
    subprocess.run([sys.executable, str(shared / "unpack.py"), str(images), "cifar10"], check=True, capture_output=True)
    overrides = [
        f"data.path={images / 'cifar-10-batches-bin'}",
        "flow.training.iterations=50",
        "flow.training.warmup=10",
        "pools.lsmix.copies=1",
        "classifier.epochs=1",
        "classifier.width=8",
        "runs.baseline.seeds=[0]",
        "runs.lsmix.seeds=[0]",
    ]
    yield "cifar10-small", ["cifar10-small", *(word for override in overrides for word in ("--set", override))]


def _renamed(words: list[str]) -> list[str]:
    """Return the arguments with which the reference runs the same recipe."""
    path = Path(words[0])
    if path.suffix != ".toml":
        return words
    text = path.read_text()
    for new, old in RENAMED_FIELDS.items():
        text = text.replace(new, old)
    renamed = path.with_name(f"reference-{path.name}")
    renamed.write_text(text)
    return [str(renamed), *words[1:]]


def _checkout(scratch: Path, commit: str) -> Path:
    """Return a folder from which the reference commit is imported as ``lsmix``."""
    folder = scratch / "checkout"
    if not folder.exists():
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True).stdout
        (folder / "lsmix").mkdir(parents=True)
        subprocess.run(["tar", "-x", "-C", str(folder / "lsmix")], input=archive, check=True)
    return folder


def _link(scratch: Path, tree: Path) -> Path:
    """Return a folder from which a tree is imported as ``lsmix``."""
    folder = scratch / "link"
    folder.mkdir(exist_ok=True)
    if not (folder / "lsmix").is_symlink():
        (folder / "lsmix").symlink_to(tree)
    return folder


def _run(path: Path, words: list[str], workspace: Path) -> None:
    """Run a recipe with the version of lsmix in ``path``."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    recipe = words[0]
    if not recipe.endswith(".toml"):
        text = subprocess.run(
            [sys.executable, "-m", "lsmix", "init", recipe], env=environment, check=True, capture_output=True
        ).stdout
        recipe = str(workspace.parent / f"{recipe}.toml")
        Path(recipe).parent.mkdir(parents=True, exist_ok=True)
        Path(recipe).write_bytes(text)
    command = "mix" if words == ["demo"] else "run"  # the classifiers of the demo have changed
    call = [
        sys.executable,
        "-m",
        "lsmix",
        command,
        recipe,
        *words[1:],
        "--workspace",
        str(workspace),
        "--device",
        "cpu",
    ]
    subprocess.run([*call, "--quiet"], env=environment, check=True, stdout=subprocess.DEVNULL)


def _compare(recipe: str, before: Path, after: Path) -> int:
    """Print one line per artifact; return the number of differing artifacts."""
    old, new = _artifacts(before), _artifacts(after)
    differing = 0
    for label in sorted(old.keys() | new.keys()):
        faults = _faults(old.get(label, {}), new.get(label, {}))
        differing += bool(faults)
        what = "; ".join(faults[:5]) if faults else f"{len(new[label])} arrays equal"
        print(f"{recipe}: {label}: {what}", flush=True)
    return differing


def _faults(old: Arrays, new: Arrays) -> list[str]:
    old = {RENAMED.get(name, name): array for name, array in old.items()}
    faults = [f"{name} is missing" for name in sorted(old.keys() - new.keys())]
    faults += [f"{name} is new" for name in sorted(new.keys() - old.keys() - NEW)]
    for name in sorted(old.keys() & new.keys()):
        a, b = old[name], new[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            faults.append(f"{name} was {a.dtype} {a.shape} and is {b.dtype} {b.shape}")
        elif a.tobytes() != b.tobytes():
            faults.append(f"{name} differs in {np.count_nonzero(a != b)} of {a.size} values")
    return faults


def _artifacts(workspace: Path) -> dict[str, Arrays]:
    """Return the arrays of all artifacts of a workspace by stage and name, without artifacts that have none."""
    found = {}
    for path in sorted(workspace.glob("*/*/manifest.json")):
        manifest = json.loads(path.read_bytes())
        arrays = dict(_arrays(path.parent))
        if arrays:
            found[f"{path.parent.parent.name} {manifest['name']}"] = arrays
    return found


def _arrays(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            for name, tensor in load_file(path).items():
                yield f"{path.name}/{name}", tensor
        elif path.suffix == ".h5":
            with h5py.File(path) as file:
                names: list[str] = []
                file.visit(names.append)
                for name in names:
                    if isinstance(file[name], h5py.Dataset):
                        yield f"{path.name}/{name}", np.asarray(file[name][()])
        elif path.suffix == ".zarr":
            group = zarr.open_group(path, mode="r")
            for name, array in group.arrays():
                yield f"{path.name}/{name}", np.asarray(array[...])


if __name__ == "__main__":
    sys.exit(main())
