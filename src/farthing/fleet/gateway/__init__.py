"""The gateway of a fleet: one OpenAI-compatible address in front of many replicas.

A request passes, in this order:

guard      limits on connections and heads, before anything is parsed
server     what the gateway answers itself, keys
bodies     the body, bounded
prefix     the prompt's block hashes
proxy      which replica, and whether another one
hold       waiting for a replica, which wakes a fleet that is scaled to zero
replicas   the choice: health, circuit breaker, load, cached prefix
exchange   one request on one replica, relayed as it arrives

health and silence take replicas out of rotation; poison keeps a request from killing one after another.
"""

from farthing.fleet.gateway.config import GatewayConfig
from farthing.fleet.gateway.server import Gateway

__all__ = ["Gateway", "GatewayConfig"]
