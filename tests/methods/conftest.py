import pytest

from fastunlearn.methods import registry


@pytest.fixture
def methods_go_again(monkeypatch):
    """What a test registers is gone after it."""
    registry.methods()  # those of the package are imported: what is registered once is not registered again
    monkeypatch.setattr(registry, "_records", dict(registry._records))
