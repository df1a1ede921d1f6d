"""Object stores: the contract, and a server in trouble."""

from __future__ import annotations

import uuid

import pytest
from holdfast.tests.storage.contract import StoreContract


class TestMemory(StoreContract):
    """obstore's own, without a server."""

    @pytest.fixture
    def url(self) -> str:
        return f"memory://{uuid.uuid4().hex}"


class TestS3(StoreContract):
    """A real server."""

    @pytest.fixture
    def url(self, s3: str) -> str:
        return f"{s3}/run-7"
