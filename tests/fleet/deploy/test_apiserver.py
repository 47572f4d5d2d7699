"""deploy/ against a real API server, and the controller against a real control plane.

Runs if `FARTHING_KUBE_APISERVER` is a directory with kube-apiserver and kube-controller-manager. CRDs are
read from the directory `FARTHING_CRDS` (*.yaml); without it custom resources are skipped.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fleet.deploy.cluster import Cluster
from tests.fleet.deploy.rendering import EXAMPLES, SETS, VALUES, Object, kustomized, rendered
from tests.fleet.doubles.replica import FakeReplica
from tests.fleet.doubles.services import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BUILT_IN = ("v1", "apps/v1", "policy/v1", "autoscaling/v2")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as made:
        for name in ("farthing", "prod", "monitoring"):
            made.kubectl("create", "namespace", name)
        crds = sorted(Path(os.environ.get("FARTHING_CRDS", "/nonexistent")).glob("*.yaml"))
        for path in crds:
            made.kubectl("apply", "--server-side", "-f", str(path))
        made.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        yield made


def _known(cluster: Cluster, item: Object) -> bool:
    group = item["apiVersion"]
    if group in BUILT_IN or group.split("/")[0].endswith((".k8s.io", "rbac.authorization.k8s.io")):
        path = f"/apis/{group}" if "/" in group else f"/api/{group}"
        return cluster.get(path)[0] == 200
    return cluster.get(f"/apis/{group}")[0] == 200


@pytest.mark.parametrize("name", [*SETS, *EXAMPLES, *(f"helm:{name}" for name in VALUES)])
def test_api_server_accepts_every_object(cluster: Cluster, name: str) -> None:
    objects = rendered(name)
    known = [item for item in objects if _known(cluster, item)]
    assert len(known) >= len(objects) // 2 or name in EXAMPLES
    if os.environ.get("FARTHING_CRDS"):
        unknown = {item["kind"] for item in objects} - {item["kind"] for item in known}
        assert unknown <= {"HTTPRoute"}, unknown
    cluster.apply(known, "--dry-run=server", "--validate=strict")


def test_api_server_rejects_a_long_port_name(cluster: Cluster) -> None:
    deployment = next(o for o in kustomized("kustomize/base") if o["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["ports"][0]["name"] = "external-metrics"
    done = cluster.kubectl("apply", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(deployment))
    assert "must be no more than 15 characters" in done.stderr


# ---- the controller, live ----


class Load:
    """A replica in a thread whose rate the test sets; reports metrics like Farthing's server."""

    def __init__(self) -> None:
        self.rate, self.port = 0.0, 0
        self._stop, self._up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        async with FakeReplica(dialect="farthing", name="a") as replica:
            self.port = replica.port
            self._up.set()
            last = time.monotonic()
            while not self._stop.is_set():
                now = time.monotonic()
                for key in ("queue", "ttft", "e2e"):
                    replica.sums[key][0] += 0.5 * self.rate * (now - last)  # too slow to raise the capacity
                    replica.sums[key][1] += self.rate * (now - last)
                last = now
                await asyncio.sleep(0.05)

    def __enter__(self) -> Load:
        self._thread.start()
        self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def controller(folder: Path, name: str, config: dict[str, Any], kubeconfig: Path) -> Iterator[Any]:
    """Run `farthing fleet run` as a process and yield it."""
    with started(folder, name, config, ["-m", "farthing.cli.app"], KUBECONFIG=str(kubeconfig)) as process:
        yield process


# the files of a pod's service account, elsewhere
IN_A_POD = """
import sys
from pathlib import Path
from kubernetes.config import incluster_config
from farthing.cli.app import main
from farthing_fleet.actuators import kubernetes
folder = Path(sys.argv.pop(1))
incluster_config.SERVICE_TOKEN_FILENAME = str(folder / "token")
incluster_config.SERVICE_CERT_FILENAME = str(folder / "ca.crt")
kubernetes._NAMESPACE_FILE = folder / "namespace"
main()
"""


@contextmanager
def started(
    folder: Path, name: str, config: dict[str, Any], program: list[str], **variables: str
) -> Iterator[Any]:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, *program, "fleet", "run", str(path)]
    with (folder / f"{name}.log").open("wb") as log:
        kept = {key: value for key, value in os.environ.items() if key != "KUBECONFIG"}
        environment = {**kept, "OMP_NUM_THREADS": "1", **variables}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _config(load: Load, folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    policy = {
        "capacity": 1.0,
        "min_replicas": 1,
        "max_replicas": 16,
        "interval_s": 1.0,
        "cold_start_s": 5.0,
        "levels": ["realtime"],
        "scale_down_below": 1.0,
        "cooldown_s": 0.0,
        "latency_metric": "none",
    }
    return {
        "policy": policy,
        "signals": {"replicas": [f"http://127.0.0.1:{load.port}"], "metrics": "farthing", "window_s": 3.0},
        "state": str(folder / name),
        "metrics": f"127.0.0.1:{free_port()}",
        **sections,
    }


def _deploy(cluster: Cluster) -> None:
    """Deploy the base with a new Deployment of one replica, without resources that need operators."""
    cluster.kubectl("delete", "deployment,hpa", "--all", "-n", "farthing", "--wait=true")
    objects = [o for o in kustomized("kustomize/base") if _known(cluster, o)]
    cluster.apply([o for o in objects if o["metadata"]["name"] != "farthing-gateway"])


def test_scale_patch_lease_handover_and_unavailable_control_plane(cluster: Cluster, tmp_path: Path) -> None:
    _deploy(cluster)
    kubeconfig = cluster.kubeconfig(cluster.token("farthing-fleet", "farthing"), "scaler")
    lease = "/apis/coordination.k8s.io/v1/namespaces/farthing/leases/farthing-fleet"

    def holder() -> str:
        status, body = cluster.get(lease)
        return str(body["spec"].get("holderIdentity", "")) if status == 200 else ""

    with Load() as load:
        load.rate = 3.0

        def config(name: str) -> dict[str, Any]:
            kubernetes = {"target": "deployment/farthing", "namespace": "farthing", "identity": name}
            return _config(load, tmp_path, name, kubernetes=kubernetes)

        with (
            controller(tmp_path, "one", config("one"), kubeconfig) as first,
            controller(tmp_path, "two", config("two"), kubeconfig) as second,
        ):
            cluster.until(lambda: cluster.replicas() == 5, 60, "/scale is patched to 5")
            leader, other = (first, "two") if holder() == "one" else (second, "one")
            leader.send_signal(signal.SIGKILL)
            load.rate = 6.0
            cluster.until(lambda: holder() == other, 60, "the other takes the Lease over")
            cluster.until(lambda: cluster.replicas() == 9, 30, "the new leader patches /scale")
            cluster.stop("kube-apiserver", signal.SIGKILL)
            cluster.stop("etcd", signal.SIGKILL)
            load.rate = 8.0
            cluster.start("etcd")
            cluster.start("kube-apiserver")
            cluster.until(lambda: cluster.replicas() == 12, 90, "it acts again")


def test_controller_in_a_pod_uses_its_service_account(cluster: Cluster, tmp_path: Path) -> None:
    _deploy(cluster)
    account = tmp_path / "serviceaccount"
    account.mkdir()
    (account / "token").write_text(cluster.token("farthing-fleet", "farthing"))
    (account / "ca.crt").write_bytes(cluster.authority.read_bytes())
    (account / "namespace").write_text("farthing")
    variables = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(cluster.port)}
    with Load() as load:
        load.rate = 3.0
        config = _config(load, tmp_path, "pod", kubernetes={"target": "deployment/farthing"})
        program = ["-c", IN_A_POD, str(account)]
        with started(tmp_path, "pod", config, program, HOME=str(tmp_path), **variables):
            cluster.until(lambda: cluster.replicas() == 5, 60, "/scale is patched to 5")
