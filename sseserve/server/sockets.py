"""Opens what a server listens on: TCP addresses, a unix socket, or the sockets that the process was given.

A unix socket (unix(7)) is a file. It has its mode before anybody can connect. One that nobody listens on, as
a process that was killed leaves it, is replaced; no other file is. It is removed at the end, unless it is
another server's by then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import trio

__all__ = [
    "BACKLOG",
    "AddressSettings",
    "Sockets",
    "listening_hosts",
    "open_sockets",
    "open_sockets_blocking",
]

BACKLOG = 4096

# As ``getaddrinfo`` returns them: family, type, protocol, canonical name, address.
_Address = tuple[Any, Any, int, str, tuple[Any, ...]]


class AddressSettings(Protocol):
    """The settings of what is listened on; see ``config.Settings``."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def unix_socket(self) -> str | None: ...
    @property
    def unix_socket_mode(self) -> str: ...
    @property
    def reuse_port(self) -> bool: ...
    @property
    def tls_cert(self) -> str | None: ...


class Sockets:
    """What one server listens on.

    ``host`` and ``port`` are the first socket's; those of a unix socket are its path and 0. ``urls`` are
    where clients connect: ``unix:PATH`` for a unix socket.

    Args:
        sockets: are bound. They listen, or are told to.
        is_tls: clients speak TLS.
        host: what the user calls their address; None: each has its own.
        file: the unix socket that is to be removed at the end.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        *,
        is_tls: bool,
        host: str | None = None,
        file: UnixSocketFile | None = None,
    ) -> None:
        self._sockets = list(sockets)
        self._file = file
        names = [opened.getsockname() for opened in self._sockets]
        if host is not None:
            names = [(host or names[0][0], names[0][1])]
        self.urls = [_url(name, "https" if is_tls else "http") for name in names]
        self.host, self.port = names[0][:2] if isinstance(names[0], tuple) else (_path(names[0]), 0)

    def listen(self) -> list[socket.socket]:
        """Listen, and return the sockets, which are the caller's from then on."""
        sockets, self._sockets = self._sockets, []
        for opened in sockets:
            if not _is_listening(opened):
                opened.listen(BACKLOG)
        return sockets

    def listen_beside(self) -> list[socket.socket]:
        """Listen in one of several processes.

        TCP sockets are opened for each, on the addresses that are bound here: they have queues of their own,
        and the kernel distributes the connections. All others are duplicates, with one queue for all.
        """
        sockets = []
        for bound in self._sockets:
            if bound.family == socket.AF_UNIX and not _is_listening(bound):
                bound.listen(BACKLOG)
            if _is_listening(bound):
                # All duplicates block, or none: another process may take the connection that one waits for.
                bound.setblocking(False)
                sockets.append(bound.dup())
            else:
                sockets.append(_open_beside(bound))
        return sockets

    def close(self) -> None:
        """Close the sockets that are still here: what they have bound is kept by others, or free."""
        for opened in self._sockets:
            opened.close()
        self._sockets = []

    def remove(self) -> None:
        """Close the sockets, and remove the unix socket. This is the end of the server."""
        self.close()
        if self._file is not None:
            self._file.remove()


def listening_hosts(settings: AddressSettings, inherited: Sequence[socket.socket]) -> list[str]:
    """Return the addresses that other machines may reach, or not; none for a unix socket."""
    if inherited:
        return [str(given.getsockname()[0]) for given in inherited if given.family != socket.AF_UNIX]
    return [] if settings.unix_socket is not None else [settings.host]


async def open_sockets(settings: AddressSettings, inherited: Sequence[socket.socket] = ()) -> Sockets:
    """Bind what the settings name, or take the sockets that the process was given.

    Args:
        settings: of the address. Port 0 takes a free one, the same for all addresses of the host.
        inherited: listen already; they are used instead.

    Raises:
        OSError: it cannot be listened on.
    """
    if inherited:
        return Sockets(inherited, is_tls=settings.tls_cert is not None)
    if settings.unix_socket is not None:
        return _open_unix(settings, settings.unix_socket)
    return _open_tcp(settings, await trio.socket.getaddrinfo(*_query(settings)))


def open_sockets_blocking(settings: AddressSettings, inherited: Sequence[socket.socket] = ()) -> Sockets:
    """Do the same where no event loop runs."""
    if inherited:
        return Sockets(inherited, is_tls=settings.tls_cert is not None)
    if settings.unix_socket is not None:
        return _open_unix(settings, settings.unix_socket)
    return _open_tcp(settings, socket.getaddrinfo(*_query(settings)))


def _query(settings: AddressSettings) -> tuple[str | None, int, int, int, int, int]:
    """Return what to look up. Who listens on ``::`` expects IPv4, too, as most servers have it."""
    host = None if settings.host in ("", "::") else settings.host
    return host, settings.port, socket.AF_UNSPEC, socket.SOCK_STREAM, 0, socket.AI_PASSIVE


def _open_tcp(settings: AddressSettings, addresses: Sequence[_Address]) -> Sockets:
    port = settings.port
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as on_error:
        for family, kind, protocol, _, address in addresses:
            try:
                bound = on_error.enter_context(socket.socket(family, kind, protocol))
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT:
                    continue  # a system without IPv6
                raise
            # This lets workers bind it too; but not SO_REUSEPORT, with which another server could.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if settings.reuse_port:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind((address[0], port, *address[2:]))
            port = bound.getsockname()[1]
            sockets.append(bound)
        on_error.pop_all()
    if not sockets:
        raise OSError(errno.EAFNOSUPPORT, f"no address of {settings.host} is supported")
    return Sockets(sockets, host=settings.host, is_tls=settings.tls_cert is not None)


def _open_beside(bound: socket.socket) -> socket.socket:
    """Listen on the address of a bound socket, too."""
    beside = socket.socket(bound.family, bound.type, bound.proto)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        beside.setsockopt(socket.SOL_SOCKET, option, 1)
    if bound.family == socket.AF_INET6:
        beside.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    beside.bind(bound.getsockname())
    beside.listen(BACKLOG)
    return beside


def _open_unix(settings: AddressSettings, path: str) -> Sockets:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        file = UnixSocketFile(path, bound, int(settings.unix_socket_mode, 8))
        return Sockets([bound], file=file, is_tls=settings.tls_cert is not None)
    except BaseException:
        bound.close()
        raise


class UnixSocketFile:
    """The file that a unix socket is bound to.

    Args:
        path: where it is made.
        bound: the socket that is bound to it.
        mode: who may connect, as that of a file: whoever may write.

    Raises:
        OSError: there is another file, or a socket that a process listens on, or it cannot be made.
    """

    def __init__(self, path: str, bound: socket.socket, mode: int) -> None:
        self._path = Path(path).absolute()  # the process may go to another directory
        with _locked(self._path.parent):
            if self._is_abandoned():
                self._path.unlink()
            # The mode that the file is made with, so that nobody else can ever connect; less the umask.
            os.fchmod(bound.fileno(), mode)
            bound.bind(str(self._path))
            self._path.chmod(mode)
            # As long as it is open no other file gets the number of its inode.
            self._held = os.open(self._path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)

    def remove(self) -> None:
        """Remove the file, unless it is another server's by now, which does not depend on ours."""
        with contextlib.suppress(OSError), _locked(self._path.parent, wait=False):
            if os.path.samestat(self._path.lstat(), os.fstat(self._held)):
                self._path.unlink()
        os.close(self._held)

    def _is_abandoned(self) -> bool:
        """Return whether there is a socket that nobody listens on.

        Raises:
            OSError: there is something else.
        """
        try:
            status = self._path.lstat()
        except FileNotFoundError:
            return False
        if not stat.S_ISSOCK(status.st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file which is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.setblocking(False)  # the queue of who listens may be full
            try:
                client.connect(str(self._path))
            except ConnectionRefusedError:
                return True
            except BlockingIOError:
                pass
            raise OSError(errno.EADDRINUSE, "another process listens on it")


@contextmanager
def _locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep other servers from making and removing their sockets: none takes a new one for an abandoned one.

    Raises:
        OSError: there is no such directory, or without ``wait`` another one has the lock.
    """
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _path(name: str | bytes) -> str:
    """Return the path of a unix socket; that of an abstract one begins with @."""
    return os.fsdecode(name).replace("\0", "@", 1) if name[:1] in ("\0", b"\0") else os.fsdecode(name)


def _is_listening(opened: socket.socket) -> bool:
    return bool(opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _url(name: Any, scheme: str) -> str:
    if not isinstance(name, tuple):
        return f"unix:{_path(name)}"
    host, port = name[:2]
    # The zone of a link-local address, as in fe80::1%eth0 (RFC 6874, section 2).
    return f"{scheme}://[{host.replace('%', '%25')}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
