"""MindIE's rules for files: owner, mode, links, the characters and the length of paths; and the repair of modes.

All of MindIE-LLM v3.0.0.beta.2 src/utils/safe_path.cpp. The daemon applies them to modelWeightPath, its config.json and
generation_config.json, of which it first resolves links; MindIE's documents ask for the same of every file of a model.
Older code, src/utils/log/file_utils.cpp, judges conf/config.json and the files for TLS: it exempts nobody.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_mindie.errors import name_some
from telechat_mindie.findings import Finding, Severity, error, ok
from telechat_mindie.staging import DIR_MODE, FILE_MODE

if TYPE_CHECKING:
    from typing_extensions import LiteralString

SKIP_VARIABLE = "MINDIE_CHECK_INPUTFILES_PERMISSION"
FOLLOWED = ("config.json", "generation_config.json")
"""Files of a model directory that the daemon reads itself, and links of which it resolves first."""

MAX_ENTRIES = 10_000  # of a model directory; a sane one has tens


@dataclass(frozen=True)
class User:
    """Who MindIE runs as.

    Attributes:
        uid: MindIE looks at owners and modes of a model directory for any user but root.
        exempt: MINDIE_CHECK_INPUTFILES_PERMISSION is 0 for it.
        strict: the file is one for which neither counts.
    """

    uid: int
    exempt: bool = False
    strict: bool = False


def path_fault(value: str) -> LiteralString:
    """What MindIE takes for a `modelWeightPath` where it does not take `value`, empty where it does.

    src/utils/safe_path.cpp:141-179, 375-403: made absolute and normal first, then characters, lengths and depth.
    """
    normal = posixpath.normpath(value) if value else ""
    if not re.fullmatch(r"[a-zA-Z0-9_./-]+", normal) or ".." in normal:
        return "letters, digits, `_`, `-`, `.` and `/` only, without `..` inside a name"
    names = [name for name in normal.split("/") if name]
    if len(normal) > 4096 or len(names) > 31 or any(len(name) > 255 for name in names):
        return "at most 4096 characters, 31 folders deep, 255 characters a name"
    return ""


def place_note(model_path: Path) -> str:
    """What to say before a directory is made where MindIE will not take it; empty where it will."""
    rule = path_fault(os.path.abspath(model_path))  # noqa: PTH100 - as it will be named, links and all
    if not rule:
        return ""
    return f"MindIE will refuse {model_path} at this place, for a path may have {rule}: rename or move it then."


def tree(root: Path) -> list[Path]:
    """`root` and everything below it, links not followed, at most MAX_ENTRIES."""
    entries = [root]
    for folder, folders, files in os.walk(root):
        entries.extend(Path(folder, name) for name in sorted(folders + files))
        if len(entries) > MAX_ENTRIES:
            break
    return entries[:MAX_ENTRIES]


def check_tree(root: Path, user: User) -> Iterator[Finding]:
    """The file rules for a model directory, where `root` is a link for what it names, as in MindIE."""
    entries = [_followed(entry) for entry in tree(root.resolve())]
    if len(entries) == MAX_ENTRIES:
        yield error(
            "too-many-files", root, f"holds {MAX_ENTRIES} files or more", "Only the first were looked at; clean it up."
        )
    found = list(findings(entries, user))
    yield from found
    if not found:
        yield ok("files", root, f"{len(entries)} files and folders as MindIE wants them: owner, modes, paths, no links")


def _followed(entry: Path) -> Path:
    return entry.resolve() if entry.name in FOLLOWED and os.path.exists(entry) else entry  # noqa: PTH110


def linked(root: Path) -> bool:
    """Whether anything at the top of a model directory is a link that its rules refuse."""
    return any(link_findings([_followed(entry) for entry in root.resolve().iterdir()]))


def findings(entries: list[Path], user: User) -> Iterator[Finding]:
    """The file rules for files and folders, of which the first is at their top."""
    yield from path_findings(entries)
    yield from link_findings(entries)
    yield from permission_findings(entries, user)


def path_findings(entries: list[Path]) -> Iterator[Finding]:
    """Characters, length and depth, by the rule of `modelWeightPath`."""
    refused: dict[str, list[str]] = {}
    for entry in entries:
        if rule := path_fault(str(entry)):
            refused.setdefault(rule, []).append(repr(str(entry)))
    for rule, names in refused.items():
        yield error(
            "path", entries[0], f"MindIE refuses the path of {name_some(names)}: it takes {rule}", "Rename or move it."
        )


def link_findings(entries: list[Path]) -> Iterator[Finding]:
    """No FIFO, socket or device, and no symbolic link: MindIE itself would follow one (safe_path.cpp:156-190), but a
    directory must be complete in itself: its manifest does not seal what a link names."""
    for entry in entries:
        if (status := file_status(entry)) is None:
            continue
        if stat.S_ISLNK(status.st_mode):
            yield error(
                "link",
                entry,
                "is a symbolic link, and a model directory must be complete in itself",
                f"Copy what it points to: cp -rL {entry} {entry}.copy && rm {entry} && mv {entry}.copy {entry}",
            )
        elif not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            yield error("special-file", entry, "is neither a file nor a folder", f"Remove it: rm {entry}")


def permission_findings(entries: list[Path], user: User) -> Iterator[Finding]:
    """Owner, readability, and modes of at most 0640 and 0750: CheckOwner, CheckMode, CheckMaxPermission."""
    foreign, files, folders, unreadable = [], [], [], []
    for entry in entries:
        if (status := file_status(entry)) is None or stat.S_ISLNK(status.st_mode):
            continue
        mode = stat.S_IMODE(status.st_mode)
        name = f"{entry.name} ({mode & 0o777:04o})"
        if status.st_uid != user.uid:
            foreign.append(f"{entry.name} (uid {status.st_uid})")
        if stat.S_ISDIR(status.st_mode):
            if mode & 0o777 & ~DIR_MODE:
                folders.append(name)
            if mode & 0o500 != 0o500:
                unreadable.append(name)
        elif stat.S_ISREG(status.st_mode):
            if mode & 0o777 & ~FILE_MODE:
                files.append(name)
            if not mode & 0o400:
                unreadable.append(name)
    root = entries[0]
    if foreign and (user.uid != 0 or user.strict):
        yield _exemptible(
            user,
            "owner",
            root,
            f"belongs to another user than uid {user.uid}, which runs MindIE: {name_some(foreign)}",
            f"As root: chown -R {user.uid} {root}",
        )
    chmod = f"chmod 640 {root}"
    if len(entries) > 1:
        chmod = f"find {root} -type d -exec chmod 750 {{}} + ; find {root} -type f -exec chmod 640 {{}} +"
        chmod += " (chmod -R 640 would close the folders)"
    advice = f"Run the check with --fix, or: {chmod}"
    if files:
        yield _exemptible(user, "file-mode", root, f"modes over 0640: {name_some(files)}", advice)
    if folders:
        yield _exemptible(user, "folder-mode", root, f"modes over 0750: {name_some(folders)}", advice)
    if unreadable and user.uid != 0:
        yield error("unreadable", root, f"closed to their own owner: {name_some(unreadable)}", advice)


def fix_modes(root: Path) -> list[str]:
    """Take away what MindIE refuses, give the owner back what he needs, and say what was done.

    Links are left alone, and so is all else: owners, names, contents.
    """
    repairs = []
    for entry in tree(root):
        try:
            descriptor = os.open(entry, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            status = os.fstat(descriptor)
            before = stat.S_IMODE(status.st_mode)
            if stat.S_ISDIR(status.st_mode):
                after = before & DIR_MODE | 0o500
            elif stat.S_ISREG(status.st_mode):
                after = before & FILE_MODE | 0o400
            else:
                continue
            if after != before:
                # By descriptor: a name could have become a link to something else by now.
                os.chmod(f"/proc/self/fd/{descriptor}", after)  # noqa: PTH101
                repairs.append(f"chmod {after:o} {entry} (was {before:o})")
        except OSError as failure:
            repairs.append(f"could not chmod {entry}: {failure.strerror}")
        finally:
            os.close(descriptor)
    return repairs


def _exemptible(user: User, id: str, where: Path, message: str, advice: str) -> Finding:
    """An error, unless MindIE lets this user pass."""
    severity: Severity = "error"
    if user.strict:
        message += "; MindIE lets nobody pass, not even root"
    elif user.uid == 0:
        severity, message = "warning", f"{message}; MindIE lets root pass, and no other user"
    elif user.exempt:
        severity, message = "warning", f"{message}; MindIE lets it pass, since {SKIP_VARIABLE}=0"
    return Finding(id, severity, str(where), message, advice)


def file_status(path: Path) -> os.stat_result | None:
    """lstat, or None where there is nothing, or nothing that this user may see."""
    try:
        return path.lstat()
    except OSError:
        return None
