"""Where callers reach this worker: its addresses, its UDP ports, and the servers that help."""

import errno
import ipaddress
import json
import socket
from collections.abc import Mapping
from pathlib import Path

import attrs

from gpuworker.engines.base import EngineError, Missing, OptionError, OptionValue


@attrs.frozen
class Reach:
    """What the options say of it.

    Args:
        ports: of UDP.
        hosts: addresses of this machine to offer; all of them if empty.
        public_ip: the address in their place, "" if there is none.
        ice_servers_file: "" if there is none.
    """

    ports: range
    hosts: list[str]
    public_ip: str
    ice_servers_file: str

    @property
    def loopback(self) -> bool:
        """Whether this machine offers itself to itself."""
        return any(ipaddress.ip_address(host).is_loopback for host in self.hosts)

    def ice_servers(self) -> list[dict[str, str]]:
        """The fields of each STUN or TURN server in the file.

        Raises:
            EngineError: it cannot be read, or holds something else.
        """
        path = self.ice_servers_file
        if not path:
            return []
        try:
            listed = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            servers = [
                {name: each[name] for name in ("urls", "username", "credential") if name in each} for each in listed
            ]
            if all(isinstance(each["urls"], str | list) for each in servers):
                return servers
        except OSError as fault:
            raise EngineError(f"-o ice_servers_file={path} cannot be read: {fault.strerror}") from None
        except (ValueError, TypeError, KeyError):
            pass
        wanted = '[{"urls": "turn:…", "username": "…", "credential": "…"}]'
        raise EngineError(f"-o ice_servers_file={path}: write a JSON list: {wanted}")

    # -- for `doctor`

    def lacking(self) -> list[Missing]:
        """What keeps calls from being answered here."""
        found = []
        for host in self.hosts or ["0.0.0.0"]:
            try:
                if not self.count_free(host):
                    found.append(Missing(f"a free UDP port on {host}: {self._named_ports} are all taken"))
            except OSError as fault:
                found.append(Missing(f"an address of this machine in -o host: {host}: {fault.strerror}"))
        return found

    def describe(self) -> str:
        """What callers are offered.

        Raises:
            EngineError: the file with servers cannot be used.
        """
        import aioice.ice

        hosts = self.hosts or aioice.ice.get_host_addresses(use_ipv4=True, use_ipv6=True)
        free = self.count_free(hosts[0] if hosts else "0.0.0.0")
        parts = [
            f"offers {', '.join(hosts) or 'no address, as this machine has none'}",
            f"{free} of the UDP ports {self._named_ports} are free",
            f"callers are told {self.public_ip}" if self.public_ip else "no public_ip",
            f"{len(self.ice_servers())} STUN or TURN servers of its own",
        ]
        return "; ".join(parts)

    def count_free(self, host: str) -> int:
        """How many ports of the range nobody has on an address.

        Raises:
            OSError: the address is not this machine's.
        """
        free = 0
        for port in self.ports:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                try:
                    sock.bind((host, port))
                except OSError as fault:
                    if fault.errno != errno.EADDRINUSE:
                        raise
                else:
                    free += 1
        return free

    @property
    def _named_ports(self) -> str:
        return f"{self.ports[0]}-{self.ports[-1]}"


def read_reach(options: Mapping[str, OptionValue]) -> Reach:
    """Read the options.

    Raises:
        OptionError: one of them is wrong.
    """
    given = str(options["ports"])
    first, _, last = given.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 1024 <= int(first) <= int(last) <= 65_535):
        raise OptionError(f"-o ports={given}: write a range of UDP ports from 1024 on, such as 50000-50199")
    hosts = [_address("host", each) for each in str(options["host"] or "").split(",") if each.strip()]
    public_ip = _address("public_ip", str(options["public_ip"])) if options["public_ip"] else ""
    return Reach(range(int(first), int(last) + 1), hosts, public_ip, str(options["ice_servers_file"] or ""))


def _address(name: str, given: str) -> str:
    try:
        return str(ipaddress.ip_address(given.strip()))
    except ValueError:
        raise OptionError(f"-o {name}={given}: write an IP address, not a name") from None
