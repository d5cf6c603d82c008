"""What both ends of relayd share, and the client library; `protocol.blocking` is the same for programs without Trio."""

from protocol.client.client import RelayClient as RelayClient
from protocol.client.client import open_relay as open_relay
from protocol.client.stream import AudioRestarted as AudioRestarted
from protocol.client.stream import Restarted as Restarted
from protocol.client.stream import Stream as Stream
from protocol.commands.wav_writer import AudioWriter as AudioWriter
from protocol.wire.errors import ConnectError as ConnectError
from protocol.wire.errors import LinkBroken as LinkBroken
from protocol.wire.errors import LinkClosed as LinkClosed
from protocol.wire.errors import LoginRefused as LoginRefused
from protocol.wire.errors import ProtocolError as ProtocolError
from protocol.wire.errors import RequestCancelled as RequestCancelled
from protocol.wire.errors import RequestError as RequestError
from protocol.wire.errors import RequestFailed as RequestFailed
from protocol.wire.errors import RequestRejected as RequestRejected

#: The former name of `RelayClient`, for one release.
Relay = RelayClient
