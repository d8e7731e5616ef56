"""Which of several servers to ask next: load, health, and keeping one group of requests on one of them."""

import time
from collections import OrderedDict
from collections.abc import Sequence
from urllib.parse import urlsplit

from cocoedit_jax.errors import UserError

_REMEMBERED = 4096  # affinity keys


def endpoint_url(url: str) -> str:
    """The base URL in OpenAI's sense: without a path, ``/v1`` is meant. Raises UserError for what is no such URL."""
    if not isinstance(url, str):
        raise UserError(f"endpoints: {url!r} given, expected a URL such as http://127.0.0.1:8000/v1")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"endpoints: {url!r} given, expected a URL ({error})") from error
    if parts.username or parts.password:
        raise UserError(
            f"endpoints: the URL of {parts.hostname!r} holds a user name or password; give the key as key_env or "
            "key_file instead"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise UserError(f"endpoints: {url!r} given, expected a URL such as http://127.0.0.1:8000/v1")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


class Endpoint:
    """One server with its circuit breaker: after ``failures`` bad attempts in a row it is left alone for ``seconds``,
    then one request tries it; that one decides.
    """

    def __init__(self, url: str, failures: int, seconds: float):
        self.url = url
        self.load = 0  # attempts under way
        self._limit, self._rest = failures, seconds
        self._bad = 0
        self._until = 0.0
        self._trying = False

    @property
    def wait(self) -> float:
        """Seconds until it may be asked; 0: now."""
        if self._trying:
            return 0.05  # somebody else finds out
        return max(0.0, self._until - time.monotonic())

    @property
    def is_open(self) -> bool:
        """Whether the breaker has tripped and no attempt has shown since that the server is back."""
        return self._bad >= self._limit

    def begin(self) -> None:
        self.load += 1
        self._trying = self.is_open

    def end(self, healthy: bool | None, pause: float = 0.0) -> bool:
        """An attempt is over; ``healthy`` is None when it says nothing (it was cancelled). ``pause``: seconds for which
        the server asked to be left alone. Returns whether the breaker tripped now.
        """
        self.load -= 1
        self._trying = False
        now = time.monotonic()
        self._until = max(self._until, now + pause)
        if healthy is None:
            return False
        was_open = self.is_open
        self._bad = 0 if healthy else self._bad + 1
        if self.is_open:
            self._until = max(self._until, now + self._rest)
        return self.is_open and not was_open


class EndpointPool:
    """Chooses endpoints. Not thread-safe: it lives in one event loop."""

    def __init__(self, urls: Sequence[str], failures: int, seconds: float):
        self.endpoints = {url: Endpoint(url, failures, seconds) for url in map(endpoint_url, urls)}
        if not self.endpoints or len(self.endpoints) != len(urls):
            raise UserError(f"endpoints: {list(urls)!r} given, expected at least one URL, each of them once")
        self._homes: OrderedDict[str, Endpoint] = OrderedDict()

    def choose(self, affinity: str = "", url: str = "") -> tuple[Endpoint | None, float]:
        """An endpoint to ask now, or None and the seconds to wait before asking again.

        The least loaded of those that are well. A key of ``affinity`` stays with its first choice until that is not
        well, and then with the one that takes its place.
        """
        candidates = [self.endpoints[url]] if url else list(self.endpoints.values())
        home = self._homes.get(affinity)
        if not url and affinity and home is not None and not home.wait:
            self._homes.move_to_end(affinity)
            return home, 0.0
        ready = [endpoint for endpoint in candidates if not endpoint.wait]
        if not ready:
            return None, min(endpoint.wait for endpoint in candidates)
        chosen = min(ready, key=lambda endpoint: endpoint.load)
        if affinity and not url:
            self._homes[affinity] = chosen
            while len(self._homes) > _REMEMBERED:
                self._homes.popitem(last=False)
        return chosen, 0.0
