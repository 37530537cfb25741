import os
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

with suppress(ImportError):
    from hypothesis import settings

    # The same examples on every run, however slow the machine, and no .hypothesis folder; a test's own settings go on from these.
    settings.register_profile("suite", derandomize=True, deadline=None, database=None)
    settings.load_profile("suite")

# Files of a minute and more, most of it in a few tests or in processes that they start.
LONG = ("test_rows_triton.py", "test_divergence_triton.py", "test_distributed.py", "test_docs.py", "test_resume.py", "test_build.py")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin files of few tests last, however long they take
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes take files in turns, those of `LONG` come first, then those of many tests: none is left to the end."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (LONG.index(item.path.name) if item.path.name in LONG else len(LONG), -tests[item.path], item.path))
