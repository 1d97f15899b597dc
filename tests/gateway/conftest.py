"""What most tests of the gateway start with: a policy that echoes, a gateway, and a client of one session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.gateway_policy import Policy, echo, start
from tests.gateway.session_client import Client
from trl_steppo.gateway import GatewayServer


@pytest.fixture
def policy() -> Policy:
    return Policy(echo)


@pytest.fixture
def server(policy: Policy) -> Iterator[GatewayServer]:
    server = start(policy)
    yield server
    server.close()


@pytest.fixture
def client(server: GatewayServer) -> Client:
    return Client(server)
