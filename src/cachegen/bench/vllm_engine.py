"""Serving through running vLLM servers, one for each mode, over their HTTP interface.

Nothing of vLLM is imported: a server may be anywhere. Its own counters say what was loaded; without
the connector there are none, and nothing counts as a hit.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachegen.bench.serving import Clock, Served
from cachegen.errors import ConfigError, StoreError

# Counters of the connector, see ``connectors.metrics``, under any prefix.
LOADED_TOKENS = "cachegen_loaded_tokens_total"
LOADED_BYTES = "cachegen_loaded_bytes_total"
NETWORK_S = "cachegen_network_seconds_total"
DECODE_S = "cachegen_decode_seconds_total"
STAGED_CHUNKS = "cachegen_staged_chunks_total"
SETTLED_CHUNKS = "cachegen_settled_chunks_total"
_COUNTERS = (LOADED_TOKENS, LOADED_BYTES, NETWORK_S, DECODE_S, STAGED_CHUNKS, SETTLED_CHUNKS)
POLL_S = 0.1
TIMEOUT_S = 600.0


@dataclass
class VllmEngine:
    """Sends requests to servers, one at a time.

    servers: base URL of each mode's server, such as ``http://127.0.0.1:8000``; prefix caching has
    to be off, lest hits of the engine's own cache are taken for hits of the store.
    settle_s: how long a server may go on saving after an answer.
    Raises: ConfigError for a server that does not answer.
    """

    servers: Mapping[str, str]
    settle_s: float = 60.0
    _salts: dict[str, str] = field(default_factory=dict)
    _models: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for mode, url in self.servers.items():
            listed = self._json(f"{url}/v1/models")
            try:
                self._models[mode] = str(listed["data"][0]["id"])
            except (KeyError, IndexError, TypeError):
                raise ConfigError(
                    f"server of mode {mode}", got=url, expected="a vLLM server with a model"
                ) from None
            self.forget(mode)

    def serve(self, mode: str, token_ids: Sequence[int], *, output_tokens: int) -> Served:
        """Send a request and read its answer token by token, then wait until it is saved."""
        url = self.servers[mode]
        before = self.counters(mode)
        body = {
            "model": self._models[mode],
            "prompt": list(token_ids),
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": self._salts[mode],
        }
        clock = Clock()
        ttft_s = 0.0
        answer: list[int] = []
        for event in self._events(f"{url}/v1/completions", body):
            for choice in event.get("choices", ()):
                got = choice.get("token_ids") or ()
                if got and not answer:
                    ttft_s = clock.elapsed_s()
                answer += got
        e2e_s = clock.elapsed_s()
        if not answer:
            raise StoreError(
                f"answer of {url}", got="no tokens", expected="token_ids in the stream, vLLM 0.22+"
            )
        after = self._settled(mode)
        grown = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in _COUNTERS}
        return Served(
            len(token_ids),
            round(grown[LOADED_TOKENS]),
            round(grown[LOADED_BYTES]),
            grown[NETWORK_S],
            grown[DECODE_S],
            ttft_s,
            e2e_s,
            tuple(answer),
        )

    def forget(self, mode: str) -> None:
        """Take a new cache salt, under which nothing is stored yet."""
        self._salts[mode] = os.urandom(16).hex()

    def quality(self, mode: str, token_ids: Sequence[int]) -> dict[str, float]:
        """Return nothing: logits are not sent; see ``cachegen eval``."""
        return {}

    def counters(self, mode: str) -> dict[str, float]:
        """Return the connector's counters, summed over labels; none without the connector."""
        totals: dict[str, float] = {}
        with self._open(f"{self.servers[mode]}/metrics") as response:
            for line in response.read().decode().splitlines():
                name = line.partition("{")[0].partition(" ")[0]
                for counter in _COUNTERS:
                    if not line.startswith("#") and name.endswith(counter):
                        totals[counter] = totals.get(counter, 0.0) + float(line.split()[-1])
        return totals

    def _settled(self, mode: str) -> dict[str, float]:
        """Wait until what was copied is saved, as long as ``settle_s``.

        A server publishes its counters with its steps: a request of one token makes it step.
        Raises: StoreError if it takes longer.
        """
        end = time.monotonic() + self.settle_s
        while True:
            now = self.counters(mode)
            if now.get(STAGED_CHUNKS, 0.0) <= now.get(SETTLED_CHUNKS, 0.0):
                return now
            if time.monotonic() > end:
                raise StoreError(
                    f"saves of {self.servers[mode]}",
                    got=f"{now.get(SETTLED_CHUNKS, 0.0):g} chunks in {self.settle_s:g} s",
                    expected=f"{now[STAGED_CHUNKS]:g}",
                )
            time.sleep(POLL_S)
            body = {
                "model": self._models[mode],
                "prompt": [0],
                "max_tokens": 1,
                "kv_transfer_params": {"cachegen.load": False, "cachegen.save": False},
            }
            self._json(self._post(f"{self.servers[mode]}/v1/completions", body))

    def _events(self, url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Post a request and yield the server-sent events of its answer."""
        with self._open(self._post(url, body)) as response:
            for line in response:
                text = line.decode().strip()
                if text.startswith("data:") and not text.endswith("[DONE]"):
                    yield json.loads(text.removeprefix("data:"))

    @staticmethod
    def _post(url: str, body: dict[str, Any]) -> urllib.request.Request:
        data = json.dumps(body).encode()
        return urllib.request.Request(url, data, {"Content-Type": "application/json"})

    def _json(self, request: str | urllib.request.Request) -> Any:
        with self._open(request) as response:
            return json.loads(response.read())

    @staticmethod
    def _open(request: str | urllib.request.Request) -> Any:
        url = request if isinstance(request, str) else request.full_url
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except (urllib.error.URLError, ValueError, OSError) as error:
            raise ConfigError(
                f"server {url}",
                got=str(error),
                expected="a vLLM server that answers",
                remedy="start it with vllm serve --no-enable-prefix-caching",
            ) from None


def parse_servers(pairs: Sequence[str]) -> dict[str, str]:
    """Read ``MODE=URL`` pairs. Raises: ConfigError for none, or another form."""
    servers: dict[str, str] = {}
    for pair in pairs:
        mode, equals, url = pair.partition("=")
        if not equals or not mode or not url.startswith(("http://", "https://")):
            raise ConfigError("server", got=pair, expected="MODE=http://host:port")
        servers[mode] = url.rstrip("/")
    if not servers:
        raise ConfigError(
            "servers of engine vllm",
            got="none",
            expected="--server MODE=URL for each mode",
            remedy="start one vLLM server for each mode with vllm serve",
        )
    return servers
