"""Cores, memory nodes and quotas, read from trees that look like Linux's /sys and /proc."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing import cpus
from farthing.cpus import Cpus

VERSION_1 = "sys/fs/cgroup/cpu"


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def machine(
    root: Path, nodes: Mapping[int, str], cores: Sequence[str], online: str, told: str = "core_cpus_list"
) -> None:
    """nodes: CPU lists; cores: the hardware threads of each; told: the file that names siblings."""
    system = "sys/devices/system"
    write(root, {f"{system}/node/node{number}/cpulist": cpus for number, cpus in nodes.items()})
    write(root, {f"{system}/cpu/online": online})
    for core in cores:
        for cpu in core.replace("-", ",").split(","):
            write(root, {f"{system}/cpu/cpu{cpu}/topology/{told}": core})


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """2 sockets of 4 cores of 2 hardware threads: core c has CPUs c and c + 8."""
    cores = [f"{core},{core + 8}" for core in range(8)]
    machine(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, cores, "0-15")
    return tmp_path


def test_hardware_threads_share_cores_and_cores_nodes(two_sockets: Path) -> None:
    found = Cpus.read(two_sockets, range(16))
    assert (found.cores, found.hardware_threads, found.machine_nodes) == (8, 16, 2)
    assert found.topology == "0:0+8,1+9,2+10,3+11;1:4+12,5+13,6+14,7+15"
    assert found.threads() == 8 and found.threads(2) == 4 and found.threads(3) == 2 and found.threads(99) == 1
    assert found.pinned


def test_affinity_leaves_one_socket(two_sockets: Path) -> None:
    found = Cpus.read(two_sockets, [4, 5, 6, 7, 12, 13, 14, 15])
    assert found.topology == "1:4+12,5+13,6+14,7+15" and found.threads() == 4
    assert found.machine_nodes == 2, "of which the packed file may lie in the other"


def test_affinity_leaves_one_hardware_thread_of_each_core(two_sockets: Path) -> None:
    found = Cpus.read(two_sockets, range(8))
    assert found.topology == "0:0,1,2,3;1:4,5,6,7" and found.threads() == found.hardware_threads == 8


def test_affinity_leaves_parts_of_cores(two_sockets: Path) -> None:
    found = Cpus.read(two_sockets, [0, 8, 9, 4])
    assert found.topology == "0:0+8,9;1:4" and found.threads() == 3


def test_offline_cpus_are_left_out(tmp_path: Path) -> None:
    machine(tmp_path, {0: "0-1,4"}, ["0,4", "1"], "0-1,4")
    found = Cpus.read(tmp_path, range(8))  # an affinity that still names them
    assert found.topology == "0:0+4,1" and found.threads() == 2


def test_clusters_of_a_socket_are_nodes_and_memory_alone_is_none(tmp_path: Path) -> None:
    """Sub-NUMA clustering, with a node of memory without CPUs and a gap in the numbers."""
    machine(tmp_path, {0: "0-1", 1: "2-3", 4: "", 6: "4-5"}, list("012345"), "0-5")
    found = Cpus.read(tmp_path, range(6))
    assert found.topology == "0:0,1;1:2,3;6:4,5" and found.machine_nodes == 4


def test_kernels_that_tell_no_siblings(tmp_path: Path) -> None:
    """As of some ARM servers; and of systems without /sys."""
    write(tmp_path, {"sys/devices/system/node/node0/cpulist": "0-3"})
    for root in (tmp_path, tmp_path / "absent"):
        found = Cpus.read(root, range(4))
        assert found.topology == "0:0,1,2,3" and found.threads() == 4
        assert not found.pinned, "there is nothing to keep apart"


def test_kernels_that_tell_siblings_by_an_older_name(tmp_path: Path) -> None:
    machine(tmp_path, {0: "0-3"}, ["0-1", "2-3"], "0-3", "thread_siblings_list")
    assert Cpus.read(tmp_path, range(4)).topology == "0:0+1,2+3"


@pytest.mark.parametrize(
    ("files", "quota", "threads"),
    [
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5, 1),
        ({"sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5, 2),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None, 8),
        ({"sys/fs/cgroup/cpu.max": "nonsense"}, None, 8),
        ({f"{VERSION_1}/cpu.cfs_quota_us": "50000", f"{VERSION_1}/cpu.cfs_period_us": "100000"}, 0.5, 1),
        ({f"{VERSION_1}/cpu.cfs_quota_us": "-1", f"{VERSION_1}/cpu.cfs_period_us": "100000"}, None, 8),
        # A service's group, within a slice that grants less.
        (
            {
                "proc/self/cgroup": "0::/a.slice/b.service",
                "sys/fs/cgroup/a.slice/cpu.max": "300000 100000",
                "sys/fs/cgroup/a.slice/b.service/cpu.max": "600000 100000",
            },
            3,
            3,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/a/b\n0::/",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "50000",
            },
            4,
            4,
        ),
        # A container that sees its own group as the root, and the host's path.
        (
            {"proc/self/cgroup": "0::/docker/abc", "sys/fs/cgroup/cpu.max": "200000 100000"},
            2,
            2,
        ),
    ],
)  # fmt: skip
def test_quotas(two_sockets: Path, files: dict[str, str], quota: float | None, threads: int) -> None:
    write(two_sockets, files)
    found = Cpus.read(two_sockets, range(16))
    assert found.quota == quota and found.threads() == threads


@given(
    allowed=st.sets(st.integers(0, 15), min_size=1),
    quota=st.none() | st.floats(0.01, 100),
    ranks=st.integers(1, 20),
)
def test_every_cpu_is_in_one_core_and_threads_have_cores(
    allowed: set[int], quota: float | None, ranks: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / "two-sockets"
    if not root.exists():
        cores = [f"{core},{core + 8}" for core in range(8)]
        machine(root, {0: "0-3,8-11", 1: "4-7,12-15"}, cores, "0-15")
    found = Cpus(Cpus.read(root, allowed).nodes, quota)
    listed = [cpu for cores in found.nodes.values() for core in cores for cpu in core]
    assert sorted(listed) == sorted(allowed)
    assert found.cores == len({cpu % 8 for cpu in allowed})
    assert 1 <= found.threads(ranks) <= max(1, found.cores // ranks)


def test_vcpus_that_are_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware threads, as clouds count; a share of one is rounded up."""
    for quota, expected in ((None, 4), (2.5, 3), (0.2, 1), (9.0, 4)):
        monkeypatch.setattr(cpus, "own_cpus", lambda quota=quota: Cpus({0: ((0, 2), (1, 3))}, quota))
        assert cpus.usable_cpus() == expected


def test_this_machine() -> None:
    found = Cpus.read()
    assert found.hardware_threads == len(os.sched_getaffinity(0)) and 1 <= found.threads() <= found.cores
