"""The wire protocol that relay, workers and clients share, and the client library for Trio programs.

`protocol.blocking` is the same library for programs without Trio.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protocol.client.client import RelayClient as RelayClient
    from protocol.client.client import open_relay as open_relay
    from protocol.client.inputs import From as From
    from protocol.client.inputs import Live as Live
    from protocol.client.stream import AudioRestarted as AudioRestarted
    from protocol.client.stream import Restarted as Restarted
    from protocol.client.stream import Stream as Stream
    from protocol.client.stream import VideoRestarted as VideoRestarted
    from protocol.commands.wav_writer import AudioWriter as AudioWriter
    from protocol.wire.errors import ConnectError as ConnectError
    from protocol.wire.errors import InputClosed as InputClosed
    from protocol.wire.errors import LinkBroken as LinkBroken
    from protocol.wire.errors import LinkClosed as LinkClosed
    from protocol.wire.errors import LoginRefused as LoginRefused
    from protocol.wire.errors import ProtocolError as ProtocolError
    from protocol.wire.errors import RequestCancelled as RequestCancelled
    from protocol.wire.errors import RequestError as RequestError
    from protocol.wire.errors import RequestFailed as RequestFailed
    from protocol.wire.errors import RequestRejected as RequestRejected

    Relay = RelayClient

# Imported when first asked for: every command imports this package, and few need a client.
_HOMES = {
    "AudioWriter": "commands.wav_writer",
    "AudioRestarted": "client.stream",
    "ConnectError": "wire.errors",
    "From": "client.inputs",
    "InputClosed": "wire.errors",
    "LinkBroken": "wire.errors",
    "LinkClosed": "wire.errors",
    "Live": "client.inputs",
    "LoginRefused": "wire.errors",
    "ProtocolError": "wire.errors",
    "RelayClient": "client.client",
    "RequestCancelled": "wire.errors",
    "RequestError": "wire.errors",
    "RequestFailed": "wire.errors",
    "RequestRejected": "wire.errors",
    "Restarted": "client.stream",
    "Stream": "client.stream",
    "VideoRestarted": "client.stream",
    "open_relay": "client.client",
}


def __getattr__(name: str) -> Any:
    if name == "Relay":  # the former name of `RelayClient`, for one release
        name = "RelayClient"
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
