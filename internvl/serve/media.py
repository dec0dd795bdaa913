"""Fetches images and videos by address: `data:`, `http(s)://` and, where allowed, `file://`.

Whoever may send a request chooses the addresses, so that each is checked: hosts by the addresses
that they resolve to, again after every redirect, files by the folder that they are in, and sizes
before anything is decoded.
"""

import binascii
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from base64 import b64decode
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from internvl.serve.errors import ApiError
from internvl.serve.options import Limits

_MOST_REDIRECTS = 3
_BLOCK = 64 * 1024
_AGENT = "internvl-serve"


def fetch(url: str, param: str, limits: Limits, *, most: int, seconds: int) -> bytes:
    """Returns the encoded image or video at an address.

    Args:
        param: the field that names it.
        most: most bytes.
        seconds: time in which it must be here.

    Raises:
        ApiError: an address that is not allowed, not reachable, too slow or too large.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return _check_size(_from_data(url, param), most, param)
    if scheme == "file":
        return _from_file(url, param, limits, most)
    if scheme in ("http", "https"):
        return _from_web(url, param, limits, most, time.monotonic() + seconds)
    raise ApiError(
        f"{param}: an address begins with data:, http:// or https://, not {url[:40]!r}; send a "
        "file's bytes as data:image/jpeg;base64,…",
        param=param,
    )


def _check_size(content: bytes, most: int, param: str) -> bytes:
    if not content:
        raise ApiError(f"{param}: it is empty", param=param)
    if len(content) > most:
        raise _too_large(len(content), most, param)
    return content


def _too_large(size: int | None, most: int, param: str) -> ApiError:
    counted = "" if size is None else f"{size:,} bytes, "
    return ApiError(f"{param}: {counted}more than {most:,} bytes; send a smaller file", param=param)


def _from_data(url: str, param: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ApiError(f"{param}: a data: address is data:image/…;base64,…", param=param)
    try:
        return b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"{param}: its data is not base64 ({error})", param=param) from None


def _from_file(url: str, param: str, limits: Limits, most: int) -> bytes:
    """Reads a file below one of the allowed folders, links resolved."""
    refusal = ApiError(
        f"{param}: this server reads no such file; it must be below a folder of --allow-files",
        param=param,
    )
    address = urlsplit(url)
    if address.netloc not in ("", "localhost") or not limits.allow_files:
        raise refusal
    try:
        path = Path(unquote(address.path)).resolve(strict=True)
        allowed = any(path.is_relative_to(folder.resolve()) for folder in limits.allow_files)
        # One answer for all: nobody learns which other files there are.
        if not allowed or not path.is_file():
            raise refusal
        with path.open("rb") as file:
            return _check_size(file.read(most + 1), most, param)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise refusal from None


def _from_web(url: str, param: str, limits: Limits, most: int, until_s: float) -> bytes:
    for _ in range(_MOST_REDIRECTS + 1):
        try:
            content = _request(url, param, limits, most, until_s)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # An ApiError is a ValueError too.
            if isinstance(error, ApiError):
                raise
            if isinstance(error, TimeoutError) or time.monotonic() >= until_s:
                raise _too_slow(param) from None
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ApiError(f"{param}: it cannot be fetched ({reason:.100})", param=param) from None
        if isinstance(content, bytes):
            return _check_size(content, most, param)
        url = content
        # A redirect leads to other schemes too, such as file:.
        if urlsplit(url).scheme not in ("http", "https"):
            raise ApiError(f"{param}: it redirects to {url[:40]!r}", param=param)
    raise ApiError(f"{param}: more than {_MOST_REDIRECTS} redirects", param=param)


def _request(url: str, param: str, limits: Limits, most: int, until_s: float) -> bytes | str:
    """Returns the body at an address, or the address that it redirects to."""
    split_url = urlsplit(url)
    host = split_url.hostname
    if not host or split_url.username is not None:
        raise ApiError(f"{param}: the address has no plain host name", param=param)
    secure = split_url.scheme == "https"
    port = split_url.port or (443 if secure else 80)
    address = _resolve(host, port, param, limits)
    connection = http.client.HTTPConnection(host, port)
    # To the very address that was checked: a second look-up may give another one.
    connection.sock = socket.create_connection(address, timeout=_left(until_s))
    # A host that sends a byte now and then is never late for the socket's own time-out.
    deadline = threading.Timer(_left(until_s), _shut, [connection.sock])
    deadline.start()
    try:
        if secure:
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
        target = split_url.path or "/"
        target += f"?{split_url.query}" if split_url.query else ""
        headers = {"User-Agent": _AGENT, "Accept": "image/*, video/*, */*;q=0.1"}
        connection.request("GET", target, headers=headers)
        sock = connection.sock
        sock.settimeout(_left(until_s))
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return urljoin(url, response.headers.get("Location", ""))
        if response.status != 200:
            raise ApiError(f"{param}: its host answers {response.status}", param=param)
        return _read(response, sock, param, most, until_s)
    finally:
        deadline.cancel()
        connection.close()


def _shut(sock: socket.socket) -> None:
    # Closed already if the answer came in the same moment.
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _read(
    response: http.client.HTTPResponse, sock: socket.socket, param: str, most: int, until_s: float
) -> bytes:
    """Reads a body in blocks; the deadline holds for all of them together."""
    if response.length is not None and response.length > most:
        raise _too_large(response.length, most, param)
    blocks: list[bytes] = []
    size = 0
    while True:
        sock.settimeout(_left(until_s))
        # A single read of the socket: `read` would wait for a whole block, byte after byte.
        block = response.read1(_BLOCK)
        if not block:
            # The end of a connection that was shut is no end of a body.
            _left(until_s)
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            return b"".join(blocks)
        size += len(block)
        if size > most:
            raise _too_large(None, most, param)
        blocks.append(block)


def _left(until_s: float) -> float:
    """Returns the seconds that are left. Raises TimeoutError if none are."""
    seconds = until_s - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _too_slow(param: str) -> ApiError:
    return ApiError(
        f"{param}: it was not here in time; send its bytes as data:…;base64,…", param=param
    )


def _resolve(host: str, port: int, param: str, limits: Limits) -> tuple[str, int]:
    """Returns the address of a host. Raises ApiError unless all its addresses are public."""
    addresses = [
        str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ]
    if host not in limits.allow_hosts and not all(map(_is_public, addresses)):
        raise ApiError(
            f"{param}: {host} is not a public address; --allow-hosts {host} allows it",
            param=param,
            code="address_not_allowed",
        )
    return addresses[0], port


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    # A gateway of the network (NAT64) leads from these to IPv4 addresses, private ones too.
    if ip in _NAT64:
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip in _NAT64_LOCAL:
        return False
    # An IPv4 address inside an IPv6 one is checked as what it is.
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    ip = mapped or ip
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")
"""RFC 8215: what it leads to is the network's own."""
