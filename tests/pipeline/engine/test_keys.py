"""Cache keys depend on contents, and not on paths, times, devices or the order of fields."""

import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsmix.data.artifact import InputRecord
from lsmix.data.errors import MissingError
from lsmix.pipeline.api import plan
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.workspace import cache_key as keys
from lsmix.pipeline.workspace.cache_key import SourceDigests, artifact_key, canonical_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)  # fmt: skip


def turned(value):
    """Return the same value with every dictionary filled in the opposite order."""
    if isinstance(value, dict):
        return {name: turned(part) for name, part in reversed(value.items())}
    return [turned(part) for part in value] if isinstance(value, list) else value


@given(json_values)
def test_canonical_json_does_not_depend_on_the_order_of_a_dictionary(value):
    assert canonical_json(turned(value)) == canonical_json(value)


def test_canonical_json_never_changes():
    # Written by hand: sorted keys, no spaces, shortest numbers, UTF-8. A change would invalidate every cache.
    value = {"b": [1, 2.5, None], "a": {"é": True, "A": 1e-3}}
    assert canonical_json(value) == '{"a":{"A":0.001,"é":true},"b":[1,2.5,null]}'.encode()


def test_a_key_never_changes():
    # Computed by sha256(b'["mix",1,{"alpha":0.4},[["flow","f"],["latents","l"]]]').hexdigest()[:12]
    records = [
        InputRecord(role="latents", cache_key="k", content_digest="l"),
        InputRecord(role="flow", cache_key="", content_digest="f"),
    ]
    assert artifact_key("mix", 1, {"alpha": 0.4}, records) == "5b836de1b034"


def test_a_key_depends_on_stage_version_fields_roles_and_digests_but_not_on_input_keys_or_order():
    def key(stage="mix", version=1, fields=None, inputs=(("a", "1"), ("b", "2")), input_key=""):
        records = [InputRecord(role=role, cache_key=input_key, content_digest=root) for role, root in inputs]
        return artifact_key(stage, version, fields or {"alpha": 0.4}, records)

    assert key() == key(inputs=(("b", "2"), ("a", "1"))) == key(input_key="elsewhere")
    others = [
        key(stage="train"),
        key(version=2),
        key(fields={"alpha": 0.5}),
        key(inputs=(("a", "2"), ("b", "1"))),
        key(inputs=(("a", "1"),)),
    ]
    assert len({key(), *others}) == 6


@pytest.fixture
def source(tmp_path):
    """Return an NPZ data set with an old modification time."""
    path = tmp_path / "source" / "images.npz"
    path.parent.mkdir()
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (40, 8, 8, 1), np.uint8), labels=np.arange(40) % 4)
    os.utime(path, ns=(10**18, 10**18))
    return path


def first_key(recipe_text, folder, workspace, **more):
    folder.mkdir(exist_ok=True)
    (folder / "my.toml").write_text(recipe_text)
    _, nodes, place = plan(folder / "my.toml", workspace=workspace, **more)
    return Resolver(place).key(nodes[0])


def test_a_key_depends_on_contents_and_not_on_paths_times_or_names(source, tmp_path):
    text = 'name = "{}"\n[data]\npath = "{}"\nheldout = 4\ntest = 4\n'
    key = first_key(text.format("one", source), tmp_path / "a", tmp_path / "runs")
    moved = tmp_path / "elsewhere" / source.name
    moved.parent.mkdir()
    shutil.copyfile(source, moved)
    os.utime(moved, ns=(2 * 10**18, 2 * 10**18))
    assert first_key(text.format("two", moved), tmp_path / "b", tmp_path / "other") == key
    assert first_key(text.format("two", moved) + 'format = "npz"\n', tmp_path / "b", tmp_path / "other") == key
    content = bytearray(moved.read_bytes())
    content[2000] ^= 1
    moved.write_bytes(content)
    assert first_key(text.format("one", moved), tmp_path / "a", tmp_path / "runs") != key


def count_hashes(monkeypatch):
    hashed = []
    real = keys.sha256_file
    monkeypatch.setattr(keys, "sha256_file", lambda path: hashed.append(path) or real(path))
    return hashed


def test_a_source_is_hashed_again_only_if_its_size_time_or_inode_changes(source, tmp_path, monkeypatch):
    hashed = count_hashes(monkeypatch)
    memory = tmp_path / "runs" / ".sources.json"

    def digest():
        return SourceDigests(memory).digest([source], source.parent)

    first = digest()
    assert digest() == first
    assert len(hashed) == 1
    os.utime(source, ns=(3 * 10**18, 3 * 10**18))
    assert digest() == first
    assert len(hashed) == 2
    digest()
    assert len(hashed) == 2, "the new checksum must be cached"
    copy = source.with_suffix(".copy")
    shutil.copy2(source, copy)  # same size and time, another inode
    copy.replace(source)
    assert digest() == first
    assert len(hashed) == 3
    source.write_bytes(source.read_bytes() + b"x")
    os.utime(source, ns=(3 * 10**18, 3 * 10**18))
    assert digest() != first
    assert len(hashed) == 4


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"[1]", b'{"a": 1}', b"{"])
def test_a_damaged_cache_of_checksums_is_ignored(source, tmp_path, damage):
    memory = tmp_path / ".sources.json"
    expected = SourceDigests(memory).digest([source], source.parent)
    memory.write_bytes(damage)
    assert SourceDigests(memory).digest([source], source.parent) == expected


def test_a_digest_can_be_computed_without_writing_the_cache(source, tmp_path):
    SourceDigests(tmp_path / "runs" / "memory").digest([source], source.parent, remember=False)
    assert not (tmp_path / "runs").exists()


def test_a_missing_source_is_named(source, tmp_path):
    with pytest.raises(MissingError, match=r"gone\.npz' does not exist\. Check 'data\.path'"):
        SourceDigests(tmp_path / "memory").digest([source.with_name("gone.npz")], source.parent)
