"""Peak memory of a loss and its gradients, by the operating system, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

PROGRAM = """
import torch, fastalign

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))

{inputs}
({small}).backward()  # loads every library
hidden.grad = weight.grad = None
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
before = status("VmRSS")
loss = {loss}
loss.backward()
print(status("VmHWM") - before)
"""


def growth(inputs: str, loss: str, *, small: str, **numbers: int) -> int:
    """Bytes by which memory grows at most while `loss` is computed and differentiated.

    `inputs` are statements that make `hidden`, `weight` and whatever else the loss reads, of the given `numbers`; `small` is a loss
    that is computed before the measurement and needs little.
    """
    made = "".join(f"{name} = {number}\n" for name, number in numbers.items()) + dedent(inputs)
    code = PROGRAM.format(inputs=made, small=small, loss=loss)
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
