"""The documentation site builds in strict mode, is complete, loads nothing from other hosts, and its notebook runs."""

import ast
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import lsmix
from lsmix.cli import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PACKAGES = ("classifiers", "data", "glow", "pipeline")
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def in_nav(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from in_nav(part)


def module_at(path: Path) -> ModuleType:
    """Import a file of docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hook(name: str) -> ModuleType:
    pytest.importorskip("mkdocs", reason="needs pip install --group docs")
    return module_at(DOCS / "hooks" / f"{name}.py")


def notebook() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))
    return content


# Pages and images.


def test_every_page_is_in_the_navigation_once_and_every_entry_is_a_page():
    entries = list(in_nav(SETTINGS["nav"]))
    assert len(entries) == len(set(entries))
    inside = {entry for entry in entries if not entry.startswith("repository/")}
    assert inside == {path.relative_to(DOCS).as_posix() for path in PAGES} | {"tutorial.md"}
    for entry in set(entries) - inside:
        assert (ROOT / entry.removeprefix("repository/").replace("readme.md", "README.md")).is_file(), entry


def test_the_navigation_has_the_four_kinds_of_documentation():
    kinds = ["Home", "Tutorial", "How-to", "Reference", "Explanation"]
    assert [next(iter(entry)) for entry in SETTINGS["nav"]] == kinds


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_images_exist_and_have_alternative_texts(page):
    for described, picture in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / picture).is_file()
        assert len(described) > 20, f"{picture} needs an alternative text"


def test_images_are_small_and_drawn_by_make_pictures():
    made = module_at(DOCS / "make_pictures.py")
    files = sorted(made.FOLDER.iterdir())
    assert {path.name for path in files} == {"order.png", *made.DRAWN_BY_FIGURE}
    for path in files:
        assert path.stat().st_size < 60_000
        with Image.open(path) as picture:
            assert picture.format == "PNG"


def test_the_image_of_the_latent_order_is_up_to_date():
    made = module_at(DOCS / "make_pictures.py")
    with Image.open(io.BytesIO(made.order_picture())) as new, Image.open(made.FOLDER / "order.png") as old:
        assert new.size == old.size
        below = np.asarray(new)[40:, 140:], np.asarray(old)[40:, 140:]  # titles depend on the FreeType version
    np.testing.assert_array_equal(*below)


# The hooks.


def test_repository_links_become_links_to_pages_of_the_site():
    rewritten = hook("repository_pages").rewritten
    known = {"tutorial.md", "maths.md", "api/data/pool.md", "repository/readme.md"}
    text = "[a](tutorial.ipynb) [b](maths.md#bits) [c](../data/pool.py) [d](../README.md) [e](../LICENSE) [f](https://x.org)"
    expected = (
        "[a](tutorial.md) [b](maths.md#bits) [c](api/data/pool.md) [d](repository/readme.md) e [f](https://x.org)"
    )
    assert rewritten(text, "how.md", known) == expected
    absolute = "[d](https://github.com/lsmix/lsmix/blob/main/docs/maths.md)"
    assert rewritten(absolute, "repository/readme.md", known) == "[d](../maths.md)"
    assert rewritten("[m](docs/maths.md)", "repository/readme.md", known) == "[m](../maths.md)"
    assert rewritten("```\n[x](nowhere.md)\n```\n", "how.md", known) == "```\n[x](nowhere.md)\n```\n"


def test_a_broken_link_fails_the_build():
    rewritten = hook("repository_pages").rewritten
    with pytest.raises(Exception, match=r"docs/how\.md: broken link to '\.\./nothing\.md'"):
        rewritten("[n](../nothing.md)", "how.md", set())


def test_a_notebook_becomes_a_page():
    cells = [
        {"cell_type": "markdown", "source": ["# T\n", "text"]},
        {"cell_type": "code", "source": ["%%writefile a.toml\n", "x = 1"], "outputs": []},
        {"cell_type": "code", "source": "1", "outputs": [{"data": {"text/plain": ["1"]}}, {"name": "stdout", "text": ["2\n"]}]},
        {"cell_type": "code", "source": "p", "metadata": {"alt": "all"}, "outputs": [{"data": {"image/png": "AAAA"}}]},
    ]  # fmt: skip
    text, pictures = hook("notebook_page").as_markdown({"cells": cells}, "n")
    assert text == (
        '# T\ntext\n\n```toml title="a.toml"\nx = 1\n```\n\n```python\n1\n```\n\n```text\n1\n```\n\n```text\n2\n```\n\n'
        "```python\np\n```\n\n![all](n-1.png)\n"
    )
    assert pictures == {"n-1.png": b"\0\0\0"}


def test_the_comment_after_a_field_documents_it():
    pytest.importorskip("griffe", reason="needs pip install --group docs")
    comment = hook("docstrings").comment_behind
    assert comment(["    bits: int = 5  # of a pixel, 1 to 8"]) == "of a pixel, 1 to 8"
    assert comment(['name: str = "# none"']) == ""
    assert comment(["x = 1  # noqa: F841"]) == ""
    assert comment(["x = (", "    1,  # inside", ")  # of all"]) == "of all"


# The built site.


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="needs pip install --group docs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],  # --quiet would hide warnings
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def places(site: Path) -> dict[str, str]:
    """Return the page of every name in the inventory of the site."""
    header = rb"^(?:#.*\n){4}"
    text = zlib.decompress(re.sub(header, b"", (site / "objects.inv").read_bytes(), count=1)).decode()
    return {line.split(" ")[0]: line.split(" ")[3] for line in text.splitlines()}


def test_every_public_name_is_on_a_page(site):
    known = places(site)
    for name in lsmix.__all__:
        if not name.startswith("__"):
            assert known[f"lsmix.{name}"].startswith("api/index.html"), name
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            if path.stem != "__init__":
                module = f"lsmix.{package}.{path.stem}"
                for name in _public_names(path):
                    assert f"{module}.{name}" in known, f"{module}.{name}"


def _public_names(path: Path) -> list[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def test_api_pages_show_signatures_and_docstrings(site):
    text = re.sub("<[^>]+>", "", (site / "api" / "index.html").read_text(encoding="utf-8"))
    signature = r"open_pool\(\s*path: Path \| str \| Artifact,\s*\*,\s*check_crc: bool = True,.*?\)\s*-&gt; Pool"
    assert re.search(signature, text, re.DOTALL)
    assert "Open the pool in an artifact" in text
    assert "Its row in the train split." in (site / "api" / "data" / "pool.html").read_text(encoding="utf-8")


def test_every_command_has_a_page(site):
    overview = (site / "cli.html").read_text(encoding="utf-8")
    for name in cli.commands:
        assert f'href="commands/{name}.html"' in overview
        assert f"lsmix {name}" in (site / "commands" / f"{name}.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_other_hosts(site):
    loads = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\s\"'>]+)")
    for page in site.rglob("*.html"):
        assert not loads.findall(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_the_site_contains_no_paths_of_this_machine(site):
    for page in site.rglob("*.html"):
        assert str(ROOT) not in page.read_text(encoding="utf-8"), page


# The notebook.


def test_the_notebook_contains_nothing_that_changes_on_each_run():
    assert set(notebook()["metadata"]) == {"kernelspec"}
    assert (DOCS / "tutorial.ipynb").stat().st_size < 60_000
    for cell in notebook()["cells"]:
        assert cell.get("execution_count") is None
        assert "execution" not in cell["metadata"]
        assert all(output["output_type"] != "error" for output in cell.get("outputs", ()))


def kinds(cells: list[Any]) -> list[list[tuple[str, list[str]]]]:
    return [[(out["output_type"], sorted(out.get("data", ()))) for out in cell.get("outputs", ())] for cell in cells]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # from pyzmq, jupyter_client and asyncio, which lsmix cannot fix
def test_the_notebook_runs_and_reproduces_its_stored_outputs(tmp_path, monkeypatch):
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason="needs pip install --group test")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "empty").mkdir()
    executed = module_at(DOCS / "make_tutorial.py").executed(tmp_path / "empty")
    assert kinds(executed.cells) == kinds(notebook()["cells"])
    printed = "".join(out.get("text", "") for cell in executed.cells for out in cell.get("outputs", ()))
    assert "[True, True, True, True]" in printed
    assert re.search(r"exact round trips:  (\d+) of \1\n", printed)
    assert "CorruptError 'lsmix-pool/pool.zarr/image/" in printed
