"""The processes of a run meet before JAX connects them, so that those that are missing are named.

JAX by itself ends the whole program (SIGABRT, exit code 134) where not all have come in time. Here each tells process
0, at the port where JAX listens next, which one it is, and process 0 answers all of them once they are complete. That
takes plain TCP, no devices and no JAX.
"""

import json
import os
import selectors
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from cocoedit_jax.errors import UserError

NEWS_S = 15.0  # between lines that say who is waited for
_RETRY_S = 0.5
_LONGEST = 4096  # bytes of a message; whoever sends more is no process of a run


def meet(address: str, count: int, index: int, seconds: float) -> None:
    """Returns in all processes when all are there.

    Args:
        address: HOST:PORT of process 0.
        count: of processes, from 1.
        index: of this one, from 0.
        seconds: to wait, from when this process calls; those that process 0 has heard wait as long as it does.

    Raises:
        UserError: in all that have come, with the same message: some are missing, or do not agree on who they are; in
            another process alone, nothing answers at ``address``; in process 0 alone, it cannot listen there.
    """
    if index:
        _come(address, count, index, seconds)
    else:
        _receive(address, count, seconds)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _line(**message: Any) -> bytes:
    return json.dumps({"cocoedit_jax": 1, **message}).encode() + b"\n"


def _read(line: bytes) -> dict[str, Any] | None:
    """The message in ``line``, unless another program sent it."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and message.get("cocoedit_jax") == 1 else None


# --- process 0 -------------------------------------------------------------------------------------------------------


def _listen(address: str) -> socket.socket:
    # JAX may be told to listen elsewhere than where the others see process 0.
    host, port = _split(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{_split(address)[1]}")
    everywhere = host in ("", "::", "0.0.0.0")
    two = everywhere and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if two or ":" in host and not everywhere else socket.AF_INET
    try:
        return socket.create_server(("" if everywhere else host, port), family=family, dualstack_ipv6=two)
    except OSError as error:
        raise UserError(f"--coordinator_address={address}: process 0 cannot listen at port {port}: {error}") from error


def _receive(address: str, count: int, seconds: float) -> None:
    heard: dict[socket.socket, bytes] = {}  # all who called
    known: dict[socket.socket, int] = {}  # of those, the processes of this run
    error = ""
    with _listen(address) as listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        end, news = time.monotonic() + seconds, time.monotonic() + NEWS_S
        while len(known) < count - 1 and not error:
            now = time.monotonic()
            if now >= end:
                error = _missing(address, count, known.values(), seconds)
            elif now >= news:
                print(f"waiting at {address} for process {_absent(count, known.values())} of {count}", flush=True)
                news = now + NEWS_S
            for key, _ in selector.select(max(0.0, min(end, news) - now)):
                if key.fileobj is listener:
                    caller, _ = listener.accept()
                    caller.setblocking(False)
                    selector.register(caller, selectors.EVENT_READ)
                    heard[caller] = b""
                    continue
                caller = key.fileobj
                assert isinstance(caller, socket.socket)
                more = _more(caller)
                heard[caller] += more
                message = _read(heard[caller]) if caller not in known else None
                if message is not None:
                    error = error or _fault(message, count, known.values())
                    known[caller] = message["process"]
                elif not more or len(heard[caller]) > _LONGEST:
                    selector.unregister(caller)
                    caller.close()
                    del heard[caller]
                    known.pop(caller, None)
    for caller in heard:  # the listener is closed: JAX takes the port
        with caller, suppress(OSError):
            if caller in known:
                caller.settimeout(_RETRY_S)
                caller.sendall(_line(error=error))
    if error:
        raise UserError(error)


def _more(connection: socket.socket) -> bytes:
    """What has come; nothing if the other side is gone."""
    try:
        return connection.recv(_LONGEST)
    except OSError:
        return b""


def _fault(message: dict[str, Any], count: int, here: Collection[int]) -> str:
    process, of = message.get("process"), message.get("of")
    if of != count:
        return f"--num_processes={of} in process {process}, {count} in process 0; expected the same in all"
    if process in here:
        return f"--process_id={process}: two processes say so; expected each number from 0 to {count - 1} once"
    return ""


def _absent(count: int, here: Collection[int]) -> str:
    absent = [str(process) for process in range(1, count) if process not in here]
    shown = absent[:8]
    return ", ".join(shown) + (f" and {len(absent) - len(shown)} more" if len(absent) > len(shown) else "")


def _missing(address: str, count: int, here: Collection[int], seconds: float) -> str:
    return (
        f"--initialization_timeout={seconds:g}: process {_absent(count, here)} of {count} did not come to "
        f"--coordinator_address={address}; expected every process to be started with this address, and no firewall "
        "before its port"
    )


# --- the others ------------------------------------------------------------------------------------------------------


def _come(address: str, count: int, index: int, seconds: float) -> None:
    end, last = time.monotonic() + seconds, ""
    while True:
        try:
            with socket.create_connection(_split(address), timeout=max(0.1, min(5.0, end - time.monotonic()))) as there:
                there.sendall(_line(process=index, of=count))
                # Process 0 started before now, so it gives up first, and says why.
                there.settimeout(seconds + 10 * _RETRY_S)
                reply = there.makefile("rb").readline(_LONGEST)
        except OSError as error:
            last = str(error)
        else:
            message = _read(reply)
            if message is not None:
                if message["error"]:
                    raise UserError(message["error"])
                return
            last = "another program answered" if reply else "the connection was closed"
        if time.monotonic() >= end:
            raise UserError(
                f"--coordinator_address={address}: nothing answers within --initialization_timeout={seconds:g} s "
                f"({last}); expected process 0 there, and no firewall before its port"
            )
        time.sleep(_RETRY_S)
