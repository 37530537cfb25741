from pathlib import Path

import pytest
from online_runs import write_place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an online run needs; modules with other needs have a `place` of their own."""
    return write_place(tmp_path_factory.mktemp("online"))
