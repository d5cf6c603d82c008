"""nginx and Caddy as deploy/ has them, but for names, ports and the certificate; a process each, on loopback."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import trio

DEPLOY = Path(__file__).parents[2] / "deploy"
#: The name that the examples are written for, and the one that their certificate has here.
EXAMPLE_NAME, NAME = "relay.example.org", "localhost"
START_S = 15.0


@attrs.frozen
class Certificate:
    """A self-signed certificate for `localhost`, and its key."""

    cert: Path
    key: Path

    def trusting(self) -> ssl.SSLContext:
        """What a client needs that trusts it alone."""
        return ssl.create_default_context(cafile=str(self.cert))


def make_certificate(folder: Path) -> Certificate:
    """A fresh one, by openssl."""
    made = Certificate(folder / "fullchain.pem", folder / "privkey.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2 -nodes -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(made.key), "-out", str(made.cert)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    return made


@attrs.frozen
class Proxy:
    """One that runs."""

    port: int
    plain_port: int


def adapted(example: str, changes: Mapping[str, str]) -> str:
    """An example with every key of `changes` replaced; one that is not there is an error."""
    for old, new in changes.items():
        assert old in example, f"{old!r} is not in the example any more"
        example = example.replace(old, new)
    return example


def nginx_config(folder: Path, upstream: str, port: int, plain_port: int, certificate: Certificate) -> Path:
    """The example in a whole configuration, under `folder`."""
    live = f"/etc/letsencrypt/live/{EXAMPLE_NAME}"
    changes = {
        "127.0.0.1:8765": upstream,
        "listen 80;": f"listen 127.0.0.1:{plain_port};",
        "listen [::]:80;": "",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen [::]:443 ssl;": "",
        f"{live}/fullchain.pem": str(certificate.cert),
        f"{live}/privkey.pem": str(certificate.key),
        EXAMPLE_NAME: NAME,
    }
    (folder / "relayd.conf").write_text(adapted((DEPLOY / "nginx.conf").read_text(), changes))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""  # its workers would not get into the test's folder else
    path = folder / "nginx.conf"
    path.write_text(
        f"{user} worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log stderr warn;\n"
        f"events {{ }}\nhttp {{ access_log off; {folders} include {folder}/relayd.conf; }}\n"
    )
    return path


def caddy_config(folder: Path, upstream: str, port: int, plain_port: int, certificate: Certificate) -> Path:
    """The example, with its global options, under `folder`."""
    http_context = f"{EXAMPLE_NAME} {{\n"
    changes = {
        http_context: f"{NAME} {{\n\tbind 127.0.0.1\n\ttls {certificate.cert} {certificate.key}\n",
        "127.0.0.1:8765": upstream,
    }
    options = f"admin off\n\thttp_port {plain_port}\n\thttps_port {port}\n\tlog {{\n\t\tlevel ERROR\n\t}}\n"
    path = folder / "Caddyfile"
    path.write_text(f"{{\n\t{options}}}\n" + adapted((DEPLOY / "Caddyfile").read_text(), changes))
    return path


def nginx_command(config: Path) -> list[str]:
    """How it is started."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"  # Debian's lies where only root's PATH leads
    return [program, "-e", "stderr", "-p", str(config.parent), "-c", str(config)]


def caddy_command(config: Path) -> list[str]:
    """How it is started."""
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(config)]


CONFIGS: dict[str, Callable[[Path, str, int, int, Certificate], Path]] = {"nginx": nginx_config, "caddy": caddy_config}
#: nginx takes its workers along; Caddy would wait for its connections if it were asked in a friendlier way.
ENDINGS = {"nginx": signal.SIGTERM, "caddy": signal.SIGKILL}
COMMANDS: dict[str, Callable[[Path], list[str]]] = {"nginx": nginx_command, "caddy": caddy_command}


@asynccontextmanager
async def open_proxy(kind: str, folder: Path, upstream: str) -> AsyncIterator[Proxy]:
    """`nginx` or `caddy` in front of `upstream` (HOST:PORT), until the end of the block; what it says is on stderr."""
    port, plain_port = _free_ports(2)
    config = CONFIGS[kind](folder, upstream, port, plain_port, certificate_in(folder))
    environ = os.environ | {name: str(folder) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(trio.run_process, COMMANDS[kind](config), env=environ, check=False)
        )
        try:
            with trio.fail_after(START_S):
                await _listening(process, port)
            yield Proxy(port, plain_port)
        finally:
            process.send_signal(ENDINGS[kind])


def certificate_in(folder: Path) -> Certificate:
    """The one in `folder`, made if need be."""
    there = Certificate(folder / "fullchain.pem", folder / "privkey.pem")
    return there if there.cert.exists() else make_certificate(folder)


async def _listening(process: trio.Process, port: int) -> None:
    while True:
        assert process.poll() is None, "it ended at once; what it said is on stderr"
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
        except OSError:
            await trio.sleep(0.02)
        else:
            await stream.aclose()
            return


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has at this moment."""
    with_them = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in with_them]
    for each in with_them:
        each.close()
    return ports
