"""KEDA's external-scaler protocol, compiled by grpcio-tools from `externalscaler.proto` at import."""

from __future__ import annotations

from typing import Any

import grpc

_PROTO = "farthing/fleet/actuators/externalscaler.proto"  # as found on sys.path

messages: Any
services: Any
messages, services = grpc.protos_and_services(_PROTO)
