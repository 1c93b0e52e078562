"""A stock SuperLink with TLS and supernode authentication, its SuperNodes, and `flwr run`, for tests.

Nothing of ours runs in these processes but what the bundle's components name, and that is imported from the installed
package. Every process has an `FLWR_HOME` of its own below one folder, and that is also how leftovers are found: stock
processes start others in sessions of their own.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hansa.common.flower import RecordDict

REPO = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
CONNECTION = "engine"
_BIN = Path(sys.executable).parent
_KEPT = ("LANG", "LC_ALL", "TMPDIR", "OMP_NUM_THREADS")


Value = str | int | float | bool


class EngineError(AssertionError):
    """A stock process did not do what a test needs; holds the end of its log."""


@dataclass
class Run:
    """One `flwr run`."""

    run_id: int
    status: str
    details: str
    log: str
    seconds: float


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    log: Path
    begun: int  # where in the log this process begins


@dataclass
class FlowerEngine:
    """A SuperLink and SuperNodes on loopback ports; a context manager that leaves no process behind.

    Args:
        folder: everything is written here; new and empty.
        path: what the processes find Python modules in besides the environment's packages (ours, if not installed).
        env: more environment for every process.
        superexec_secret: the SuperLink hands ServerApps only to an executor that knows a secret, not to any caller.
    """

    folder: Path
    path: tuple[Path, ...] = (REPO / ".dev",)
    env: Mapping[str, str] = field(default_factory=dict)
    superexec_secret: bool = False
    port: int = 0
    node_ids: dict[str, int] = field(default_factory=dict)
    _processes: dict[str, _Process] = field(default_factory=dict)
    _superlink: tuple[object, ...] = ()

    # -- life --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> FlowerEngine:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder = self.folder.resolve()
        try:
            self._make_certificates()
            self._start_superlink()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the nodes, then the SuperLink, then whatever they left."""
        for name in reversed(list(self._processes)):
            self.stop(name)
        for sig, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
            deadline = time.monotonic() + patience
            while left := self._ours():
                if time.monotonic() > deadline:
                    for pid in left:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, sig)
                    break
                time.sleep(0.05)

    def stop(self, name: str) -> None:
        """Ask a process to go (a node then tells the SuperLink), and make it after ten seconds."""
        process = self._processes.pop(name, None)
        if process is None:
            return
        process.popen.terminate()
        try:
            process.popen.wait(10)
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait()

    def kill(self, name: str) -> None:
        """SIGKILL, as a power cut: nobody is told."""
        process = self._processes.pop(name)
        process.popen.kill()
        process.popen.wait()

    def start_superlink(self) -> None:
        """Start a SuperLink again that was killed or stopped: the same port, certificates and database."""
        self._spawn("superlink", "flower-superlink", *self._superlink)
        self._until("superlink", lambda _: self._listens())

    def log(self, name: str) -> str:
        """What a process wrote: "superlink" (with its ServerApps) or a node's name (with its ClientApps)."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    # -- the federation ----------------------------------------------------------------------------------------------

    def register(self, name: str) -> int:
        """Make a node's key pair and register its public key at the SuperLink; the node's id."""
        self.make_key(name)
        told = self.flwr("supernode", "register", self.folder / f"{name}.pub", CONNECTION, "--format", "json")
        self.node_ids[name] = int(str(_json(told)["node-id"]))
        return self.node_ids[name]

    def make_key(self, name: str) -> None:
        """A key pair for a node, which nobody knows yet."""
        key = ec.generate_private_key(ec.SECP384R1())
        private = self.folder / f"{name}.key"
        _write_private(
            private,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            ),
        )
        public = self.folder / f"{name}.pub"
        public.write_bytes(
            key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        )

    def start_node(
        self, name: str, node_config: Mapping[str, Value] | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        """Start a SuperNode and wait until the SuperLink has let it in.

        Raises:
            EngineError: it ended instead.
        """
        config = _toml(node_config or {})
        self._spawn(
            name,
            "flower-supernode",
            *("--superlink", f"{HOST}:{self.port}"),
            *("--root-certificates", self.ca),
            *("--auth-supernode-private-key", self.folder / f"{name}.key"),
            *("--host", HOST, "--port", free_port()),
            *(("--node-config", config) if config else ()),
            env=env,
        )
        self._until(name, lambda log: b"SuperNode ID:" in log)

    def run(self, bundle: Path, run_config: Mapping[str, Value] | None = None, timeout_s: float = 300.0) -> Run:
        """`flwr run --stream`: start the bundle's ServerApp and wait until it is done.

        Raises:
            EngineError: it did not start, or is not done in time.
        """
        config = _toml(run_config or {})
        began = time.monotonic()
        told = self.flwr(
            "run", bundle, CONNECTION, "--stream", *(("--run-config", config) if config else ()), timeout_s=timeout_s
        )
        seconds = time.monotonic() - began
        found = re.search(r"Successfully started run (\d+)", told)
        if found is None:
            raise EngineError(f"flwr run did not start a run:\n{told}")
        row = _json(self.flwr("ls", CONNECTION, "--run-id", found[1], "--format", "json"))["runs"][0]
        return Run(int(found[1]), str(row["status"]), str(row.get("status-details", "")), told, seconds)

    def flwr(self, *arguments: object, timeout_s: float = 120.0) -> str:
        """One `flwr` command of whoever runs the federation; what it wrote.

        Raises:
            EngineError: it failed, or took too long.
        """
        command = [str(_BIN / "flwr"), *map(str, arguments)]
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=self.environment("cli"),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as err:
            shown = err.stdout.decode(errors="replace") if isinstance(err.stdout, bytes) else str(err.stdout)
            raise EngineError(f"{' '.join(command)}: not done in {timeout_s:g} s\n{shown}\n{self._logs()}") from err
        if done.returncode:
            raise EngineError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    @property
    def ca(self) -> Path:
        """The certificate by which nodes and users know the SuperLink."""
        return self.folder / "ca.pem"

    # -- parts -------------------------------------------------------------------------------------------------------

    def _start_superlink(self) -> None:
        self.port = free_port()
        home = self._home("cli")
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "{HOST}:{self.port}"\nroot-certificates = "{self.ca}"\n',
            encoding="utf-8",
        )
        isolation: tuple[object, ...] = ()
        if self.superexec_secret:
            secret = self.folder / "superexec.secret"
            _write_private(secret, os.urandom(32).hex().encode())
            isolation = ("--isolation", "process", "--superexec-auth-secret-file", secret)
        self._superlink = (
            *("--host", HOST, "--port", self.port),
            *("--ssl-ca-certfile", self.ca),
            *("--ssl-certfile", self.folder / "server.pem"),
            *("--ssl-keyfile", self.folder / "server.key"),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--database", self.folder / "superlink.db"),
            *isolation,
        )
        self.start_superlink()
        if self.superexec_secret:
            self._spawn(
                "superexec",
                "flower-superexec",
                *("--runtime-api-address", f"{HOST}:{self.port}"),
                *("--root-certificates", self.ca),
                *("--superexec-auth-secret-file", self.folder / "superexec.secret"),
            )

    def _listens(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.ca))
        try:
            with socket.create_connection((HOST, self.port), 1) as raw, context.wrap_socket(raw, server_hostname=HOST):
                return True
        except OSError:
            return False

    def _spawn(self, name: str, command: str, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        log = self.folder / f"{name}.log"
        begun = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as out:
            popen = subprocess.Popen(
                [str(_BIN / command), *map(str, arguments)],
                cwd=self._home(name),
                env={**self.environment(name), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[name] = _Process(popen, log, begun)

    def _until(self, name: str, ready: Callable[[bytes], bool], timeout_s: float = 60.0) -> None:
        process = self._processes[name]
        deadline = time.monotonic() + timeout_s
        while not ready(process.log.read_bytes()[process.begun :]):
            if process.popen.poll() is not None or time.monotonic() > deadline:
                self.stop(name)
                raise EngineError(f"{name} is not ready:\n{self.log(name)}")
            time.sleep(0.1)

    def _home(self, name: str) -> Path:
        home = self.folder / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        return home

    def environment(self, name: str) -> dict[str, str]:
        """What a process of that name finds in its environment."""
        kept = {key: os.environ[key] for key in _KEPT if key in os.environ}
        home = str(self._home(name))
        return {
            **kept,
            "PATH": os.pathsep.join([str(_BIN), "/usr/bin", "/bin"]),  # stock processes start each other by name
            "PYTHONPATH": os.pathsep.join(map(str, self.path)),
            "PYTHONUNBUFFERED": "1",
            "HOME": home,
            "FLWR_HOME": home,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            **self.env,
        }

    def _ours(self) -> list[int]:
        """Processes with a home below our folder: whatever the stock processes started and did not end."""
        mark = f"FLWR_HOME={self.folder}/homes/".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if any(line.startswith(mark) for line in (entry / "environ").read_bytes().split(b"\0")):
                        found.append(int(entry.name))
        return found

    def _logs(self) -> str:
        return "\n".join(f"--- {name}\n{self.log(name)[-3000:]}" for name in self._processes)

    def _make_certificates(self) -> None:
        now = datetime.datetime.now(datetime.UTC)
        ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

        def builder(name: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
            return (
                x509.CertificateBuilder()
                .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
                .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")]))
                .public_key(public)
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(minutes=5))
                .not_valid_after(now + datetime.timedelta(days=1))
            )

        usage = {
            "digital_signature": True,
            "content_commitment": False,
            "key_encipherment": False,
            "data_encipherment": False,
            "key_agreement": False,
            "encipher_only": False,
            "decipher_only": False,
        }
        ca = (
            builder("test CA", ca_key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        names = [x509.IPAddress(ipaddress.ip_address(HOST)), x509.DNSName("localhost")]
        server = (
            builder("localhost", key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage, key_cert_sign=False, crl_sign=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        self.ca.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
        (self.folder / "server.pem").write_bytes(server.public_bytes(serialization.Encoding.PEM))
        _write_private(
            self.folder / "server.key",
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _write_private(path: Path, data: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(data)


def _json(text: str) -> dict[str, object]:
    """The JSON object that a `flwr` command wrote among other lines."""
    start = text.index("{")
    found, _ = json.JSONDecoder().raw_decode(text[start:])
    return dict(found)


def _toml(values: Mapping[str, Value]) -> str:
    """Settings as Flower's command lines take them."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def flwr_command() -> str:
    """The `flwr` of this environment."""
    return str(_BIN / "flwr")


def forge(
    engine: FlowerEngine,
    victim: str,
    by: str,
    run_id: int,
    message_id: str,
    message_type: str,
    group_id: str,
    content: RecordDict,
) -> str:
    """Push a reply in the victim's name with the credentials of another node. What the SuperLink said to it.

    The attacker speaks the Fleet API himself, which Flower keeps private; nothing of ours imports it.
    """
    from flwr.app import Metadata
    from flwr.app.message import make_message, remove_content_from_message
    from flwr.common.serde import message_to_proto
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.message_pb2 import PushObjectRequest
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    key = serialization.load_ssh_private_key((engine.folder / f"{by}.key").read_bytes(), None)
    signing = NodeAuthHttpInterceptor(key, key.public_key())
    version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
    message = make_message(
        metadata=Metadata(
            run_id=run_id,
            message_id="",
            src_node_id=engine.node_ids[victim],
            dst_node_id=1,
            reply_to_message_id=message_id,
            group_id=group_id,
            created_at=time.time(),
            ttl=30.0,
            message_type=message_type,
        ),
        content=content,
    )
    message.metadata.__dict__["_message_id"] = message.object_id
    node = Node(node_id=engine.node_ids[by])
    address = f"{HOST}:{engine.port}"
    with FleetHttpClient.from_server_address(address, False, str(engine.ca), interceptors=[version, signing]) as client:
        told = client.PushMessages(
            PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(remove_content_from_message(message))],
                message_object_trees=[get_object_tree(message)],
                clientapp_runtime_list=[0.1],
            )
        )
        objects = get_all_nested_objects(message)
        for name in told.objects_to_push:
            client.PushObject(
                PushObjectRequest(
                    node=node,
                    run_id=run_id,
                    object_id=name,
                    object_content=objects[name].deflate(),
                    session_id=told.session_id,
                )
            )
    return "taken by the SuperLink" if told.objects_to_push else "refused by the SuperLink"
