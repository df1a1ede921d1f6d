"""How an agent talks to the other agents of its job: small gRPC calls, each with a deadline."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import Message

from ..errors import AgentMismatch, SourceGone
from . import wire_pb2 as wire
from .client import CHANNEL_OPTIONS, SERVICE, translated
from .trust import Trust

_CALL_S: Final = 5.0
_BRING_S: Final = 600.0  # an image read from a tier of another node
Reply = TypeVar("Reply", bound=Message)


class Peers:
    """The other agents, by address. All methods run on the event loop, and raise ``HoldfastError``.

    Attributes:
        calls, call_bytes: made so far, and the length of their requests and answers.
    """

    def __init__(self, job: str, agent: str, trust: Trust | None) -> None:
        self._job = job
        self._agent = agent
        self._trust = trust
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.calls = 0
        self.call_bytes = 0

    async def offer(self, address: str, offer: wire.Offer) -> wire.OfferReply:
        """Tell of an image."""
        offer.job, offer.agent = self._job, self._agent
        return await self._ask(address, "Offer", offer, wire.OfferReply)

    async def offers(self, address: str) -> wire.OfferList:
        """What that agent offers now."""
        request = wire.OffersRequest(job=self._job, agent=self._agent)
        return await self._ask(address, "Offers", request, wire.OfferList)

    async def grant(self, address: str, request: wire.GrantRequest) -> wire.GrantReply:
        """A token for the bulk port."""
        request.job, request.agent = self._job, self._agent
        return await self._ask(address, "Grant", request, wire.GrantReply)

    async def manifest(self, address: str, request: wire.ManifestRequest) -> wire.Manifest:
        """What is needed to verify an image, or a parity cell. Its text comes page by page.

        Raises ``SourceGone`` if it became another's meanwhile.
        """
        request.job, request.agent = self._job, self._agent
        told = await self._ask(address, "GetManifest", request, wire.Manifest)
        parts, got = [told.text], len(told.text)
        while got < told.text_bytes:
            request.text_offset = got
            page = await self._ask(address, "GetManifest", request, wire.Manifest)
            if page.record != told.record or not page.text:
                raise SourceGone(f"the agent at {address} holds something else now than what it was asked for")
            parts.append(page.text)
            got += len(page.text)
        told.text = b"".join(parts)
        return told

    async def inventory(self, address: str) -> wire.ImageList:
        """What that agent holds. Raises ``AgentMismatch`` if it serves another job."""
        told = await self._ask(address, "Inventory", wire.Nothing(), wire.ImageList)
        if told.job != self._job:
            raise AgentMismatch(f"the agent at {address} serves job {told.job!r}, not {self._job!r}")
        return told

    async def bring(self, address: str, request: wire.MaterialiseRequest) -> wire.MaterialiseReply:
        """Have that agent read an image from a tier, to be fetched from it."""
        request.job, request.agent = self._job, self._agent
        return await self._ask(address, "Bring", request, wire.MaterialiseReply, _BRING_S)

    async def close(self) -> None:
        """Close all connections."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def _ask(
        self, address: str, method: str, request: Message, reply: type[Reply], timeout_s: float = _CALL_S
    ) -> Reply:
        call: grpc.aio.UnaryUnaryMultiCallable[Any, Any] = self._channel(address).unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        self.calls += 1
        self.call_bytes += request.ByteSize()
        try:
            answer: Reply = await call(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise translated(error, f"{method} of the agent at {address}", timeout_s) from error
        self.call_bytes += answer.ByteSize()
        return answer

    def _channel(self, address: str) -> grpc.aio.Channel:
        found = self._channels.get(address)
        if found is None:
            if self._trust is None:
                found = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            else:
                options = [*CHANNEL_OPTIONS, *self._trust.channel_options()]
                found = grpc.aio.secure_channel(address, self._trust.channel_credentials(), options=options)
            self._channels[address] = found
        return found
