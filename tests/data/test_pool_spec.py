"""plan.json is written and read by the same model, and the column schema limits the values of a pool."""

import msgspec
import numpy as np
import pytest
from factory import invented_plan

from lsmix.data.errors import CorruptError, MissingError
from lsmix.data.pool import POOL_COLUMNS, create_pool, open_pool
from lsmix.data.pool_spec import PLAN_NAME, PoolConfig, read_spec

ORIGIN = {"content_digest": "ab" * 32, "config": {"limit": 5}, "licence": "MIT", "citation": "", "train_images": 5}


@pytest.mark.parametrize("method", ["ls-mix", "cutmix"])
def test_reading_and_writing_a_plan_keeps_its_bytes(tmp_path, method):
    (tmp_path / PLAN_NAME).write_bytes(invented_plan(ORIGIN, method))
    assert read_spec(tmp_path).to_json() == (tmp_path / PLAN_NAME).read_bytes()


def test_a_plan_contains_every_setting_of_the_pool(tmp_path):
    (tmp_path / PLAN_NAME).write_bytes(invented_plan(ORIGIN))
    written = msgspec.json.decode((tmp_path / PLAN_NAME).read_bytes())
    assert set(written["pool"]) == set(PoolConfig.__struct_fields__)
    assert set(written) == {"format_version", "stage_version", "pool", "inputs", "origin", "latents", "dim"}


def test_a_pool_rejects_a_plan_that_differs_from_its_manifest(invented_pool):
    folder = invented_pool()
    assert open_pool(folder).spec == read_spec(folder)
    content = (folder / PLAN_NAME).read_bytes()
    (folder / PLAN_NAME).write_bytes(content.replace(b'"alpha": 0.4', b'"alpha": 0.5'))
    pool = open_pool(folder)
    with pytest.raises(CorruptError, match="differs from the file listed in the manifest"):
        assert pool.spec
    (folder / PLAN_NAME).unlink()
    with pytest.raises(MissingError, match="no plan at"):
        assert pool.spec


def test_a_pool_has_exactly_the_declared_columns(tmp_path):
    shape, classes = (4, 4, 3), ("cat", "dog")
    store = create_pool(
        tmp_path,
        images_per_copy=5,
        copies=1,
        image_shape=shape,
        class_names=classes,
        method="ls-mix",
        sources=3,
        corners=True,
    )
    assert [(column.name, column.dtype) for column in store.columns] == [
        (column.name, column.dtype) for column in POOL_COLUMNS.values()
    ]


def test_reading_a_value_out_of_range_raises_an_error(invented_pool, monkeypatch):
    pool = open_pool(invented_pool(sources=4, corners=True))
    for name, column in POOL_COLUMNS.items():
        if column.kind == "pixel":
            continue
        values = pool.columns[name][:]
        largest = pool.attributes.largest(column)
        values.reshape(len(pool), -1)[7, -1] = largest + 1
        with monkeypatch.context() as patched:
            patched.setitem(pool.columns, name, values)
            with pytest.raises(CorruptError, match=rf"in row 7 {name}(\[1\])? is {largest + 1}"):
                pool.rows(0, len(pool))
            with pytest.raises(CorruptError, match="in row 7"):
                assert pool[7]
            assert pool[6].label_a == pool.label_a[6]
    assert np.array_equal(pool.rows(3, 9)["lam"], pool.lam[3:9])
