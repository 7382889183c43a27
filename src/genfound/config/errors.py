"""What a user can mend, and how it is said: in one line, with the file and the way out."""

import errno

USER_ERRORS = (ValueError, OSError, FloatingPointError)
"""Said in one line, with the traceback in the run's FAILED."""

WAYS_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room and give the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "see that you may read and write there, or give another path"),
    errno.EROFS: "give a path that can be written",
    errno.EISDIR: "a file is needed there, and it is a folder",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a folder is needed there, and it is a file"),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f) and give the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
"""Of errors of the system."""


class JobError(ValueError):
    """A job failed in another process, which has said why; or why it failed."""


def mistake(error: Exception) -> str:
    """One line about an error of the program, which is no user's."""
    return f"a mistake in the program: {type(error).__name__}: {sentence(error)}"


def sentence(error: BaseException) -> str:
    """One line about an error; what the system reports is led by the file and followed by the way out."""
    if not isinstance(error, OSError) or error.strerror is None:
        return " ".join(str(error).split())
    file = f"{error.filename}: " if error.filename is not None else ""
    way = WAYS_OUT.get(error.errno or 0)
    text = f"{file}{error.strerror}" + (f"; {way}" if way else "")
    return " ".join(text.split())
