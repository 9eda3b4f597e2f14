"""Fixtures for tests of remote data: a separate cache per test, retries without waiting, an S3 server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import make_bucket, s3_server

from lsmix.data import cache, remote


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore warnings of botocore, and of sessions that fsspec closes after its event loop has ended."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*utcnow.*:DeprecationWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each test its own cache, and do not wait before retries."""
    for module in (cache, remote):
        monkeypatch.setattr(module, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("LSMIX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """Yield a running S3 server with the empty bucket "bucket"."""
    with s3_server() as server:
        make_bucket("bucket")
        yield server
