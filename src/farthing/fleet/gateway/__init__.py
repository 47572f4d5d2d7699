"""The gateway of a local fleet: one OpenAI-compatible address in front of many replicas.

messages   what is read and written on the wire
upstream   one connection to a replica, and the pool of idle ones
replicas   who may take a request: health, circuit breaker, least load with prefix affinity
relay      one client connection: request in, replica chosen, bytes passed through
server     the process: listening socket, health checks, metrics, drain
"""

from farthing.fleet.gateway.replicas import GatewayConfig
from farthing.fleet.gateway.server import Gateway

__all__ = ["Gateway", "GatewayConfig"]
