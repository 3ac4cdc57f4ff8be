"""Output files: whole or not there, and nothing but files is ever replaced."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from typing import BinaryIO

from tracedbg.errors import FormatError, UsageError


def os_error(path: str, error: OSError) -> FormatError:
    """An OSError as the one line that a user reads."""
    if error.errno == errno.EISDIR:
        return FormatError(path, "is a directory")
    return FormatError(path, (error.strerror or str(error)).lower())


def spool_error(path: str, error: OSError) -> FormatError:
    """As os_error, where `path` goes by way of a temporary file: it is there that no room is left."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return os_error(f"{tempfile.gettempdir()} (temporary files)" if full else path, error)


def output_place(path: str, force: bool) -> str | None:
    """The file that an output named `path` becomes when it is whole: the one behind links, so that a link stays a link.

    None: what is there is no file that could be replaced (a device, a FIFO), and is written to as it is. Raises UsageError
    if a file or a disk would be overwritten without `force`, FormatError for a directory.
    """
    if not path:
        raise UsageError("the name of the output is empty")
    real = os.path.realpath(path) if os.path.islink(path) else path
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return real
    except OSError as error:
        raise os_error(path, error) from None
    if stat.S_ISDIR(mode):
        raise FormatError(path, "is a directory")
    if (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and not force:
        raise UsageError(f"{path} exists; --force overwrites it")
    # A file that has no name any more (/proc/self/fd/N of a deleted one) cannot be replaced either.
    return real if stat.S_ISREG(mode) and os.path.exists(real) and os.path.samefile(path, real) else None


def create_beside(target: str) -> tuple[BinaryIO, str]:
    """A new file beside `target`, to be renamed to it, and its name. Raises OSError."""
    # Part of the name is enough to know whose it is; a name may have 255 bytes.
    handle, name = tempfile.mkstemp(prefix=f".{os.path.basename(target)[:40]}.", dir=os.path.dirname(target) or ".")
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)
    return os.fdopen(handle, "w+b"), name
