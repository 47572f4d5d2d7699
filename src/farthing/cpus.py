"""The CPUs that this process may use: cores, hardware threads, memory nodes and quota, read from Linux."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The CPU's vendor model name; "" if the system does not report it."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


@dataclass(frozen=True, slots=True)
class Cpus:
    """What affinity and control groups leave to this process."""

    nodes: Mapping[int, tuple[tuple[int, ...], ...]]  # memory node -> its cores, as their hardware threads
    quota: float | None = None  # CPUs per second that the control groups grant; None: no limit
    machine_nodes: int = 1  # memory nodes of the machine, with those whose CPUs this process may not use

    @classmethod
    def read(cls, root: Path = Path("/"), allowed: Collection[int] | None = None) -> Cpus:
        """root: of /sys and /proc. allowed: the affinity; by default this process's."""
        system = root / "sys/devices/system"
        mine = _affinity() if allowed is None else set(allowed)
        online = _listed(system / "cpu/online") or mine
        cores: dict[tuple[int, ...], None] = {}
        for cpu in sorted(mine & online) or sorted(mine):
            cores[tuple(sorted(_siblings(system, cpu) & mine & online)) or (cpu,)] = None
        machine = dict(_nodes(system))
        homes = {cpu: number for number, cpus in machine.items() for cpu in cpus}
        nodes: dict[int, tuple[tuple[int, ...], ...]] = {}
        for core in cores:
            home = homes.get(core[0], 0)
            nodes[home] = (*nodes.get(home, ()), core)
        return cls(dict(sorted(nodes.items())), _quota(root), max(len(machine), 1))

    @property
    def cores(self) -> int:
        """Physical cores."""
        return sum(map(len, self.nodes.values()))

    @property
    def hardware_threads(self) -> int:
        """Hardware threads: what operating systems call CPUs and clouds vCPUs."""
        return sum(map(len, chain.from_iterable(self.nodes.values())))

    def threads(self, ranks: int = 1) -> int:
        """Threads of each of `ranks` that share these CPUs: one per core, as the hardware threads of a core
        share its vector units, and no more than the quota grants whole: threads that wait for each other
        stop together when a quota is used up."""
        most = self.cores if self.quota is None else min(self.cores, int(self.quota))
        return max(1, most // ranks)

    @property
    def topology(self) -> str:
        """For `_native.Backend`: "0:0+4,1+5;1:2+6,3+7" are two nodes of two cores of two hardware threads."""
        return ";".join(
            f"{number}:" + ",".join("+".join(map(str, core)) for core in cores)
            for number, cores in self.nodes.items()
        )

    @property
    def pinned(self) -> bool:
        """Whether threads are bound: to the node whose memory they read, or away from each other's cores."""
        return len(self.nodes) > 1 or self.hardware_threads > self.cores


@cache
def own_cpus() -> Cpus:
    """This process's, read once: later calls may come from a thread that is bound to fewer."""
    return Cpus.read()


def usable_cpus() -> int:
    """vCPUs that this process may use and its operator pays for: its affinity, capped by its quota."""
    cpus = own_cpus()
    return (
        cpus.hardware_threads
        if cpus.quota is None
        else max(1, min(cpus.hardware_threads, math.ceil(cpus.quota)))
    )


def _affinity() -> set[int]:
    return set(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def _listed(file: Path) -> set[int]:
    """The numbers of a list such as "0-3,8"; none if the file does not exist or is no list."""
    found: set[int] = set()
    with suppress(OSError, ValueError):
        for part in file.read_text().strip().split(","):
            low, _, high = part.partition("-")
            found |= set(range(int(low), int(high or low) + 1))
    return found


def _siblings(system: Path, cpu: int) -> set[int]:
    """The hardware threads of a CPU's core; itself alone where the system does not tell."""
    topology = system / f"cpu/cpu{cpu}/topology"
    return _listed(topology / "core_cpus_list") or _listed(topology / "thread_siblings_list") or {cpu}


def _nodes(system: Path) -> Iterator[tuple[int, set[int]]]:
    for directory in system.glob("node/node[0-9]*"):
        yield int(directory.name.removeprefix("node")), _listed(directory / "cpulist")


def _quota(root: Path) -> float | None:
    """The smallest quota of this process's control groups and those around them, in CPUs."""
    mounted = root / "sys/fs/cgroup"
    found = [_version_2(mounted / path) for path in _groups(root, "")]
    found += [_version_1(mounted / "cpu" / path) for path in _groups(root, "cpu")]
    return min((quota for quota in found if quota is not None), default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Paths of the group under a controller and of all around it. In a container the path may be that of the
    host, and the container's own group is the root."""
    yield Path()
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                group = Path(path.lstrip("/"))
                yield from (group, *group.parents)


def _version_2(group: Path) -> float | None:
    with suppress(OSError, ValueError):
        limit, period = (group / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    return None


def _version_1(group: Path) -> float | None:
    with suppress(OSError, ValueError):
        limit = int((group / "cpu.cfs_quota_us").read_text())
        return limit / int((group / "cpu.cfs_period_us").read_text()) if limit > 0 else None
    return None
