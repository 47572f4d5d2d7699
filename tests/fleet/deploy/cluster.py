"""A real control plane on loopback for one test: etcd, kube-apiserver, kube-controller-manager.

`FARTHING_KUBE_APISERVER` is the directory of the two Kubernetes binaries; etcd comes from Debian. Pods are
created but never run: there is neither a scheduler nor a kubelet.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization

from tests.fleet.doubles.certificates import Pair, issue
from tests.fleet.doubles.services import free_port, require

ADMIN, VIEWER = "admin-token", "viewer-token"


class Cluster:
    """Use as a context manager. `kubectl` and `get` act as an administrator by default."""

    def __init__(self, folder: Path) -> None:
        binaries = os.environ.get("FARTHING_KUBE_APISERVER")
        if not binaries:
            pytest.skip("FARTHING_KUBE_APISERVER does not name a folder with kube-apiserver")
        self.folder, self.binaries = folder, Path(binaries)
        self.port, self.etcd_port, self._peer_port = free_port(), free_port(), free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ca = issue(folder, "cluster-ca")
        self._serving = issue(folder, "apiserver", self._ca, server=True, hosts=("localhost",))
        self._accounts: Pair = issue(folder, "accounts")
        public = self._accounts.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / "accounts.pub").write_bytes(public)
        (folder / "tokens.csv").write_text(f"{ADMIN},admin,1,system:masters\n{VIEWER},viewer,2\n")

    def __enter__(self) -> Cluster:
        try:
            self.start("etcd")
            self.start("kube-apiserver")
            if (self.binaries / "kube-controller-manager").exists():
                self.start("kube-controller-manager")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.processes)):
            self.stop(name, signal.SIGKILL)

    # ---- processes ----

    def start(self, name: str) -> None:
        """Start one of the three and wait until it answers (except the controller manager)."""
        commands = {
            "etcd": self._etcd,
            "kube-apiserver": self._apiserver,
            "kube-controller-manager": self._manager,
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(commands[name](), stdout=log, stderr=log)
        if name == "kube-apiserver":
            self.until(lambda: self.get("/readyz")[0] == 200, 120, "the API server is ready")

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        process.send_signal(how)
        process.wait(30)

    def _etcd(self) -> list[str]:
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        return [
            require("etcd"),
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        ]

    def _apiserver(self) -> list[str]:
        return [
            str(self.binaries / "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            f"--tls-cert-file={self._serving.certificate_file}",
            f"--tls-private-key-file={self._serving.key_file}",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.folder / 'accounts.pub'}",
            f"--service-account-signing-key-file={self._accounts.key_file}",
            "--authorization-mode=RBAC",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            f"--client-ca-file={self._ca.certificate_file}",
        ]

    def _manager(self) -> list[str]:
        return [
            str(self.binaries / "kube-controller-manager"),
            f"--kubeconfig={self.kubeconfig(ADMIN)}",
            "--bind-address=127.0.0.1",
            f"--secure-port={free_port()}",
            f"--cert-dir={self.folder / 'manager'}",
            "--use-service-account-credentials=true",
            "--leader-elect=false",
            "--controllers=deployment-controller,replicaset-controller,serviceaccount-controller",
            f"--service-account-private-key-file={self._accounts.key_file}",
            f"--root-ca-file={self._ca.certificate_file}",
        ]

    # ---- use ----

    @property
    def authority(self) -> Path:
        """The certificate that signs the API server's."""
        return self._ca.certificate_file

    def kubeconfig(self, token: str, name: str = "") -> Path:
        """A kubeconfig with this token."""
        path = self.folder / f"{name or token}.kubeconfig"
        cluster = {"server": self.url, "certificate-authority": str(self._ca.certificate_file)}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        path.write_text(yaml.safe_dump(document))
        return path

    def kubectl(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [require("kubectl"), f"--kubeconfig={self.kubeconfig(ADMIN)}", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)

    def apply(self, objects: list[dict[str, Any]], *options: str) -> None:
        done = self.kubectl("apply", *options, "-f", "-", stdin=yaml.safe_dump_all(objects))
        assert done.returncode == 0, done.stderr

    def get(self, path: str, token: str = ADMIN) -> tuple[int, Any]:
        """(status, body) of a GET; (0, None) without an answer."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {token}"})
        context = ssl.create_default_context(cafile=str(self._ca.certificate_file))
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text.startswith(b"{") else text
        except urllib.error.HTTPError as problem:
            return problem.code, None
        except OSError:
            return 0, None

    def token(self, account: str, namespace: str) -> str:
        """A token of a service account."""
        done = self.kubectl("create", "token", account, "-n", namespace)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def replicas(self, name: str = "farthing", namespace: str = "farthing") -> int:
        """`spec.replicas` of a Deployment; -1 if the API server does not answer."""
        status, body = self.get(f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}")
        return int(body["spec"]["replicas"]) if status == 200 else -1

    def until(self, condition: Any, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return
            time.sleep(0.2)
        logs = {n: (self.folder / f"{n}.log").read_text()[-1500:] for n in self.processes}
        pytest.fail(f"not within {seconds:g} s: {what}\n{logs}")
