"""The error of a service that did not start, or did not stay up."""

from __future__ import annotations

from telechat_mindie.errors import TelechatMindieError


class LaunchError(TelechatMindieError):
    """MindIE is not installed, cannot serve TeleChat2, did not start in time, did not answer, or died."""
