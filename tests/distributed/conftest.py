import pytest
from team import Team


@pytest.fixture(scope="session")
def pair():
    """Two processes in a gloo group."""
    with Team(2) as team:
        yield team
