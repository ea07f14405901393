"""Hosts of one machine: each with an address, a host name, processes, a /tmp and a /dev/shm of its own.

A host is a process that sleeps in new network, mount, process and name namespaces; what runs "on" it is started through
`nsenter`, and ends with it. Several hosts hang on one bridge, in a namespace of its own: the machine's network is left
alone: nodes that share a /tmp or a loopback pass tests that two machines would fail.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.builders.commands import ROOT

SHARED = "/mnt/shared"
ENVIRONMENT = {
    "HOME": "/tmp/home",
    "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    "RAY_AUTH_MODE": "token",
    "GLOO_SOCKET_IFNAME": "eth0",
    "NCCL_SOCKET_IFNAME": "eth0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
    "RAY_worker_niceness": "0",  # else whatever else runs on this machine goes before the workers
    "LC_ALL": "C.UTF-8",
}


def why_not() -> str:
    """Why hosts cannot be made here, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "unshare", "nsenter", "curl") if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not installed"
    try:
        with Network():
            return ""
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces cannot be made here: {error}"


def _ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


class Network:
    """A bridge, and the hosts on it; all end with it."""

    def __init__(self) -> None:
        self.hosts: list[Host] = []
        self._switch = _Namespace("--net", script="ip link add bridge type bridge && ip link set bridge up")

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
        self._switch.kill()

    def add(self, name: str, number: int, shared: Path | None, token: str = "") -> Host:
        """A new host with address 10.77.0.NUMBER; without `shared`, it lacks the storage mount."""
        host = Host(name, f"10.77.0.{number}", shared, token)
        self.hosts.append(host)
        port = f"port{number}"
        ends = ("netns", self._switch.pid, "type", "veth", "peer", "name", "eth0", "netns", host.pid)
        _ip("link", "add", port, *ends)
        self._switch.run(f"ip link set {port} master bridge up")
        # Ray takes the address of the default route for its own.
        host.namespace.run(
            f"ip addr add {host.address}/24 dev eth0 && ip link set eth0 up && ip route add default dev eth0"
        )
        return host

    def cut(self, host: Host, seconds: float) -> None:
        """Takes a host's cable out for a while."""
        port = f"port{host.address.rpartition('.')[2]}"
        self._switch.run(f"ip link set {port} down")
        time.sleep(seconds)
        self._switch.run(f"ip link set {port} up")


class _Namespace:
    """A sleeping process in new namespaces."""

    def __init__(self, *kinds: str, script: str) -> None:
        self.kinds = [kind for kind in kinds if kind.startswith("--") and kind not in ("--fork", "--mount-proc")]
        self._unshare = subprocess.Popen(
            ["unshare", *kinds, "--kill-child", "sh", "-ec", f"{script}; echo up; exec sleep infinity"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._unshare.stdout and self._unshare.stderr
        if self._unshare.stdout.readline().strip() != "up":
            raise OSError(self._unshare.stderr.read().strip())
        # `--kill-child` forks: the child is in the namespaces, and takes all processes in them with it.
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().split()
        self.pid = int(children[0]) if children else self._unshare.pid

    def enter(self) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *self.kinds]

    def run(self, script: str) -> None:
        subprocess.run([*self.enter(), "sh", "-ec", script], check=True, capture_output=True, text=True)

    def kill(self) -> None:
        self._unshare.send_signal(signal.SIGKILL)
        self._unshare.wait()


class Host:
    """One host: where commands run as on a machine of its own."""

    def __init__(self, name: str, address: str, shared: Path | None, token: str) -> None:
        self.name, self.address = name, address
        mount = f"mount --bind {shlex.quote(str(shared))} {SHARED}" if shared else "true"
        # Names are looked up nowhere else: a server that does not answer would cost each look-up ten seconds.
        known = {f"10.77.0.{number}": f"host{number}" for number in range(1, 40)}
        known |= {"127.0.0.1": "localhost", "10.77.0.5": "mlflow.internal other.internal", address: name}
        if name == "tracking":
            known[address] += " mlflow.internal other.internal"
        names = "".join(f"{number} {names}\\n" for number, names in known.items())
        # The program and its environment stay where they are, also below a /tmp that this host does not see.
        places = dict.fromkeys(path for path in (str(ROOT), sys.prefix) if path.startswith("/tmp/"))
        keep = "".join(f"mkdir -p /mnt{path} && mount --bind {path} /mnt{path} && " for path in places)
        bring_back = "".join(f"mkdir -p {path} && mount --bind /mnt{path} {path} && " for path in places)
        script = f"""
            mount --make-rprivate /
            mount -t tmpfs tmpfs /mnt && mkdir {SHARED} && {mount}
            {keep}mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && chmod 1777 /tmp /dev/shm
            mkdir -p /tmp/home/.ray && (umask 077 && printf %s '{token}' > /tmp/home/.ray/auth_token)
            printf '{names}' > /tmp/hosts && mount --bind /tmp/hosts /etc/hosts
            echo 'nameserver 127.0.0.1' > /tmp/resolv.conf && mount --bind /tmp/resolv.conf /etc/resolv.conf
            {bring_back}hostname {name} && ip link set lo up"""
        self.namespace = _Namespace("--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", script=script)
        self.pid = self.namespace.pid

    def _words(self, command: str, env: dict[str, str]) -> list[str]:
        given = [f"{name}={value}" for name, value in (ENVIRONMENT | env).items()]
        return [*self.namespace.enter(), "env", "-i", "-C", "/tmp/home", *given, "bash", "-c", command]

    def run(self, command: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a shell command to its end; output and errors come back together."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": timeout}
        return subprocess.run(self._words(command, env), **pipes)  # type: ignore[call-overload,no-any-return]

    def check(self, command: str, timeout: float = 600, **env: str) -> str:
        """Runs a shell command that must succeed; returns its output."""
        done = self.run(command, timeout, **env)
        assert done.returncode == 0, f"{self.name}: {command}\n{done.stdout}"
        return done.stdout

    def start(self, command: str, log: Path, **env: str) -> subprocess.Popen[str]:
        """Starts a shell command and leaves it running."""
        with log.open("w") as stream:
            return subprocess.Popen(self._words(command, env), stdout=stream, stderr=subprocess.STDOUT, text=True)

    def kill(self) -> None:
        """Ends the host and everything on it at once, as a power cut would."""
        self.namespace.kill()
