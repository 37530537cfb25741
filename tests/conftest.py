import os
import sys
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

with suppress(ImportError):
    from hypothesis import settings

    # The same examples on every run, however slow the machine, and no .hypothesis folder; a test's own settings go on from these.
    settings.register_profile("suite", derandomize=True, deadline=None, database=None)
    settings.load_profile("suite")
