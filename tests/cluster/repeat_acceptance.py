"""How often healthy hosts raise an alarm, and how often a slowed one is found by name.

`python -m tests.cluster.repeat_acceptance`: each repetition runs the command in its short form on three hosts of this
machine; every second one has a host slowed, in turn by a slow cable, a quota of CPU time and a slow disk. Prints a line
for each and a summary; takes half an hour.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from tests.builders.hosts import Network, why_not
from tests.builders.slow_hosts import NAMES, MeasuredHosts


@contextmanager
def slow_cable(hosts: MeasuredHosts, name: str) -> Iterator[None]:
    hosts.slow_cable(name)
    try:
        yield
    finally:
        hosts.repair_cable(name)


def slowed(hosts: MeasuredHosts, number: int) -> tuple[str, str, AbstractContextManager[None]]:
    """Which host is slowed how in a repetition."""
    name = NAMES[number % len(NAMES)]
    ways = {
        "cable": lambda: slow_cable(hosts, name),
        "quota": lambda: hosts.few_cpus(name),
        "disk": lambda: hosts.slow_disk(name),
    }
    way = list(ways)[number // len(NAMES) % len(ways)]
    return name, way, ways[way]()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=20, help="of healthy hosts, and of slowed ones")
    parser.add_argument("--first", type=int, default=1, help="go on with this one: which host is slowed, and how")
    options = parser.parse_args()
    number, first = options.repetitions, options.first - 1
    if reason := why_not():
        print(reason)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the hosts end with this process
    alarms = found = 0
    with tempfile.TemporaryDirectory() as folder, Network() as network:
        hosts = MeasuredHosts(network, Path(folder))
        for repetition in range(first, first + number):
            for name, way, slow in (("", "healthy", nullcontext()), slowed(hosts, repetition)):
                began = time.monotonic()
                with slow:
                    code, document, output = hosts.accept()
                behind = sorted({"-".join(v["hosts"]) for v in document.get("verdicts", []) if v["level"] == "behind"})
                good = (code, behind) == ((1, [name]) if name else (0, []))
                alarms, found = alarms + (not name and not good), found + bool(name and good)
                seconds, load = time.monotonic() - began, os.getloadavg()[0]
                print(f"{repetition + 1} {way} {name}: exit {code}, behind {behind}, {seconds:.0f} s, load {load:.0f}")
                if not good:
                    print(output)
                sys.stdout.flush()
    print(f"healthy: {alarms} of {number} raised an alarm; slowed: {found} of {number} found by name and alone")
    return int(alarms > 0 or found < 0.95 * number)


if __name__ == "__main__":
    sys.exit(main())
