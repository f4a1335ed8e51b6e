"""What both ends of the gRPC connection share: names, limits, and how a dead connection is noticed."""

from __future__ import annotations

import os
from typing import Any

from deltaloom.errors import UsageError
from deltaloom.private.identity import SERVER_NAME, Credential
from deltaloom.private.wire.frame import CHUNK

# Without it the library prints each refused handshake to stderr, between the lines of our own log.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
try:
    import grpc
except ImportError:
    raise UsageError("private tuning needs the package 'grpcio'", hint="pip install 'deltaloom[private]'") from None

SERVICE = "deltaloom.Private"
ENROL, STREAM = f"/{SERVICE}/Enrol", f"/{SERVICE}/Stream"
LIMITS = [("grpc.max_receive_message_length", CHUNK + 4096), ("grpc.max_metadata_size", 16384)]
KEEPALIVE_SECONDS = 20.0   # a connection without a sign of life for this and half as long again is dead
SERVER_OPTIONS = [*LIMITS, ("grpc.keepalive_time_ms", int(1000 * KEEPALIVE_SECONDS)),
                  ("grpc.keepalive_timeout_ms", int(500 * KEEPALIVE_SECONDS)),
                  ("grpc.http2.ping_timeout_ms", int(500 * KEEPALIVE_SECONDS)),   # without it a lost probe is waited for a minute
                  ("grpc.http2.min_ping_interval_without_data_ms", 1000), ("grpc.http2.max_ping_strikes", 0),
                  ("grpc.so_reuseport", 0)]


def secure_channel(address: str, authority: bytes, credential: Credential, keepalive: float = KEEPALIVE_SECONDS) -> Any:
    """A channel to the owner whose authority is given; whoever cannot show a server certificate of it is not the owner."""
    options = [*LIMITS, ("grpc.ssl_target_name_override", SERVER_NAME), ("grpc.use_local_subchannel_pool", 1),
               ("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0), ("grpc.initial_reconnect_backoff_ms", 100),
               ("grpc.max_reconnect_backoff_ms", 1000), ("grpc.keepalive_time_ms", int(1000 * keepalive)),
               ("grpc.keepalive_timeout_ms", int(500 * keepalive)), ("grpc.http2.max_pings_without_data", 0),
               ("grpc.http2.ping_timeout_ms", int(500 * keepalive))]
    secured = grpc.ssl_channel_credentials(root_certificates=authority, private_key=credential.key,
                                           certificate_chain=credential.certificate)
    return grpc.secure_channel(address, secured, options=options)


def told(error: Any) -> tuple[str, str] | None:
    """The reason and the message of a refusal that came as the call's status, or None if the connection failed."""
    if error.code() != grpc.StatusCode.PERMISSION_DENIED:
        return None
    reason, _, message = str(error.details()).partition(": ")
    return reason, message
