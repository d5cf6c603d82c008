"""What both ends of relayd share, and the client library; `protocol.blocking` is the same for programs without Trio."""

from protocol.audio import AudioWriter as AudioWriter
from protocol.client import Relay as Relay
from protocol.client import open_relay as open_relay
from protocol.errors import ConnectError as ConnectError
from protocol.errors import LinkBroken as LinkBroken
from protocol.errors import LinkClosed as LinkClosed
from protocol.errors import LoginRefused as LoginRefused
from protocol.errors import ProtocolError as ProtocolError
from protocol.errors import RequestCancelled as RequestCancelled
from protocol.errors import RequestError as RequestError
from protocol.errors import RequestFailed as RequestFailed
from protocol.errors import RequestRejected as RequestRejected
from protocol.stream import AudioRestarted as AudioRestarted
from protocol.stream import Restarted as Restarted
from protocol.stream import Stream as Stream
