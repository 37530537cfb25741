"""What the processes of a run say to each other, and how they end together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from gloo import end, processes

from fastalign.errors import DataError, RankError
from fastalign.ranks import Ranks, current, joined


def test_a_process_alone_does_everything_itself() -> None:
    ranks = Ranks()
    assert (ranks.index, ranks.size, ranks.is_first, ranks.name) == (0, 1, True, "")
    assert ranks.gather(3) == [3] and ranks.any(True) and not ranks.any(False)
    assert ranks.spread(3, lambda pieces: [10 * k for k in pieces]) == [0, 10, 20]
    with pytest.raises(DataError, match="own"), ranks.together():
        raise DataError("own")
    with joined() as found:
        assert found is current() and found.size == 1


def talk(index: int, size: int) -> list[object]:
    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(index), "MASTER_ADDR": "here"}
    said: list[object] = []
    with joined("cpu") as ranks:
        assert current() is ranks and (ranks.index, ranks.size) == (index, size)
        said += [ranks.gather(f"from {index}"), ranks.any(index == 1), ranks.any(False)]
        said.append(ranks.spread(5, lambda pieces: [(index, k) for k in pieces]))
        try:  # outer blocks do not exchange again what an inner one has told
            with ranks.together(), ranks.together():
                if index == 1:
                    raise DataError("row 3 is bad")
        except (DataError, RankError) as error:
            said.append(f"{type(error).__name__}: {error}")
        said.append(ranks.gather(index))  # still in step
        try:
            ranks.spread(4, lambda pieces: [1 // k for k in pieces])
        except (ZeroDivisionError, RankError) as error:
            said.append(str(error))
        said.append(ranks.gather(index))
    assert current().size == 1 and dist.is_initialized()  # the group was there before
    return said


def test_processes_talk_and_leave_a_failed_block_together(tmp_path: Path) -> None:
    first, second, third = processes(3, tmp_path, talk)
    for said in (first, second, third):
        assert said[0] == ["from 0", "from 1", "from 2"] and said[1] and not said[2]
        assert said[3] == [(0, 0), (1, 1), (2, 2), (0, 3), (1, 4)]
        assert said[5] == said[7] == [0, 1, 2]
    assert second[4] == "DataError: row 3 is bad"
    assert first[4] == third[4] == "RankError: rank 1 of 3 stopped: row 3 is bad"
    assert "division" in first[6] and second[6].startswith("rank 0 of 3 stopped: ZeroDivisionError")


def leave(index: int, size: int) -> str:
    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(index), "MASTER_ADDR": "here"}
    try:
        with joined("cpu") as ranks:
            if index == 1:
                raise ZeroDivisionError("in a step")
            ranks.gather("for an answer that does not come")
    except (ZeroDivisionError, RankError) as error:
        if index == 1:
            dist.destroy_process_group()  # as the end of a process does
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_who_waits_for_a_process_that_failed_is_told_why(tmp_path: Path) -> None:
    first, second = processes(2, tmp_path, leave)
    assert second == "ZeroDivisionError: in a step"
    assert first == (
        "RankError: rank 1 of 2 stopped: ZeroDivisionError: in a step; continue with --resume, which takes the newest whole checkpoint"
    )


@pytest.mark.parametrize("deaf", [False, True])
def test_a_process_ends_with_the_one_that_started_it_even_when_it_listens_to_no_signal(deaf: bool) -> None:
    """A process starts another, which waits for ever, and is gone; deaf to SIGTERM the other one is ended after its grace."""
    code = f"""
import os, signal, sys, time
from fastalign.ranks import end_with_parent
if os.fork():
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if {deaf} else lambda *_: (print("asked", flush=True), os._exit(0)))
print(os.getpid(), flush=True)
"""
    waits = """
os.getppid = lambda: before.pop() if before else 1
before = [7, 7]
end_with_parent(grace=%s)
time.sleep(500)
"""
    grace = 0.1 if deaf else 400  # who listens has time to answer, on however busy a machine
    found = subprocess.run([sys.executable, "-c", code + waits % grace], capture_output=True, text=True, timeout=300)
    assert found.stdout.splitlines()[1:] == ([] if deaf else ["asked"])
    assert end([int(found.stdout.split()[0])])
