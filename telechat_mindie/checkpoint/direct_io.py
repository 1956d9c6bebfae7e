"""Files written front to back past the page cache, where the file system lets us."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from telechat_mindie.staging import FILE_MODE

STAGING_BYTES = 1 << 20
ALIGNMENT = 4096
"""Of memory, file offset and length, for O_DIRECT on any common disk."""

FLUSH_BYTES = 128 << 20
"""Without O_DIRECT: data of a file that waits in the page cache at most."""


class SequentialFile:
    """A new file that data is appended to.

    A converted model is not read again soon, and it is large: through the page cache it would push everything else out
    of memory, and finding pages for it costs more time than the disk does. So data goes to the disk with O_DIRECT from
    one aligned buffer; where the file system has no O_DIRECT (tmpfs, some network disks) it is written the ordinary way
    and flushed as it grows.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, FILE_MODE)
            self._direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, FILE_MODE)
            self._direct = False
        os.fchmod(self._descriptor, FILE_MODE)
        self._staging = mmap.mmap(-1, STAGING_BYTES)  # page-aligned
        self._filled = 0
        self._unflushed = 0

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Append the pieces' bytes. Raises OSError."""
        for piece in pieces:
            done = 0
            while done < len(piece):
                count = min(len(piece) - done, STAGING_BYTES - self._filled)
                self._staging[self._filled : self._filled + count] = piece[done : done + count]
                self._filled += count
                done += count
                if self._filled == STAGING_BYTES:
                    self._drain(STAGING_BYTES)

    def sync(self) -> None:
        """Write what is left and make it durable. Raises OSError."""
        aligned = self._filled - self._filled % ALIGNMENT
        rest = bytes(self._staging[aligned : self._filled])
        self._drain(aligned)
        self._use_page_cache()
        self._write(memoryview(rest))
        os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._staging.close()

    def _drain(self, count: int) -> None:
        with memoryview(self._staging) as staging, staging[:count] as view:
            self._write(view)
        self._filled = 0
        if not self._direct:
            self._unflushed += count
            if self._unflushed >= FLUSH_BYTES:
                os.fdatasync(self._descriptor)
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                self._unflushed = 0

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.write(self._descriptor, data[done:])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._use_page_cache()
            if done % ALIGNMENT:  # a short write, near a limit: what follows is not aligned any more
                self._use_page_cache()

    def _use_page_cache(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._direct = False
