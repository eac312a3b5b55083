"""The errors that the library raises for its users, and the exit code that each becomes.

::

    CmhError                 1   anything that went wrong
    +-- SettingsError        2   an argument or option has an impossible value
    +-- DataError            1   data are missing, empty or not of the form that was promised
    +-- PictureError         1   one picture cannot be read (jobs write it down and go on)
    +-- ArtefactError        1   an encoder folder is incomplete or of an unknown format
    +-- MissingExtra         1   an optional package is not installed
    +-- StoreError           1   Milvus cannot be reached, or refuses what it was asked
    +-- EncoderMismatch      4   codes of one encoder were about to meet those of another
    +-- UnsafeFile           4   a file would reach outside its folder, or hold a pickle
    +-- QualityGateMissed    5   a figure lies below the bar that the caller set

Each message says what was wrong, what was expected, and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class CmhError(Exception):
    """Base of every error that cmh-milvus raises on purpose; `exit_code` is the command line's."""

    exit_code: ClassVar[int] = 1


class SettingsError(CmhError, ValueError):
    """An argument or option has an impossible value."""

    exit_code = 2


class DataError(CmhError):
    """Data are missing, empty, or not of the form that was promised."""


class PictureError(CmhError):
    """One picture cannot be read; a job writes it to its failures file and goes on."""


class ArtefactError(CmhError):
    """An encoder folder is incomplete, damaged or of an unknown format."""


class MissingExtra(CmhError):
    """An optional package is not installed; the message holds the pip command."""


class StoreError(CmhError):
    """Milvus cannot be reached, or refuses what it was asked."""


class EncoderMismatch(CmhError):
    """Codes of one encoder were about to be compared with those of another."""

    exit_code = 4


class UnsafeFile(CmhError):
    """A file would reach outside its folder, or needs code to be run to be read."""

    exit_code = 4


class QualityGateMissed(CmhError):
    """A measured figure lies below the bar that the caller set."""

    exit_code = 5
