"""Where a command's results go: a folder that is made, and what is said where it cannot be written.

In: a setting's name, a path. Out: a folder. Promised: a full disk is no mistake in the configuration: it ends with exit code 1, as everywhere.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from hcsdl.config import ConfigError


def make_folder(setting: str, given: str | None, usual: str, *inside: str) -> Path:
    """Return the folder `given`, or a new one, `<usual>/<date>_<time>`, with the folders `inside`. Raises ConfigError, OSError where the disk is full."""
    folder = Path(given) if given else Path(usual) / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    with writing(setting, folder):
        for path in (folder, *(folder / name for name in inside)):
            path.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def writing(setting: str, folder: Path) -> Iterator[None]:
    """Turn an OSError in what is done inside into a ConfigError of `setting`; a full disk stays an OSError, with `folder`'s name."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, "No space left on device", str(folder)) from error
        raise ConfigError(f"{setting} must be a folder that can be written. {folder}: {error.strerror or error}.") from error
