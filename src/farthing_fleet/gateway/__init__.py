"""The gateway of a fleet: one OpenAI-compatible address in front of many replicas.

A request passes, in this order:

guard      limits on connections and heads, before parsing
server     the gateway's own endpoints, keys
bodies     the body, bounded
prefix     block hashes of the prompt
proxy      replica choice and retries
hold       waiting for a replica, which wakes a fleet that is scaled to zero
replicas   load balancing: health, circuit breaker, load, cached prefix
exchange   one request on one replica, relayed as it arrives

health and silence take replicas out of rotation; poison stops a request from killing several replicas.
"""
