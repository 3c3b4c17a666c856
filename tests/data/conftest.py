import pytest

from torsh_data import SampleCache
from torsh_data import _sample_cache as module


@pytest.fixture
def make_cache(tmp_path, monkeypatch):
    """Caches whose shared memory is a folder of the test's own."""
    shm = tmp_path / "shm"
    shm.mkdir()
    monkeypatch.setattr(module, "_SHM", shm)
    made = []

    def new(dataset, where="ram", size="50MB", **options):
        if where == "disk":
            options.setdefault("folder", tmp_path / "disk")
        made.append(SampleCache(dataset, where, size, **options))
        return made[-1]

    new.shm = shm
    new.disk = tmp_path / "disk"
    yield new
    for cache in made:
        cache.close()
    assert list(shm.glob("torsh*")) == []
