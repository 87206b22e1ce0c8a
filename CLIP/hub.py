"""The Hugging Face hub, through huggingface_hub (optional): its cache, resuming, mirror and offline settings apply.

Nothing here imports torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from utils import InputError, sha256_file

PREFIX = "hf-hub:"
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")


def redact(text: str) -> str:
    """The text with `user:password@` in its addresses replaced by `***@`."""
    return CREDENTIALS.sub("***@", text)


def one_line(words: object) -> str:
    """A text, or what an exception says, in at most 150 printable characters: it may quote a damaged file."""
    text = f"{type(words).__name__} {words}" if isinstance(words, Exception) else str(words)
    printable = "".join(letter if letter.isprintable() else " " for letter in redact(text[:1000]))
    return " ".join(printable.split())[:150]


def fetch(repository: str, names: Sequence[str]) -> Path:
    """The first of the files `names` that the hub's `repository` (`owner/name`, `owner/name@revision`) has.

    Raises:
        InputError: no such repository or none of the files, no network and not in the cache, no huggingface_hub.
    """
    path = fetch_if_there(repository, names)
    if path is None:
        raise InputError(f"{PREFIX}{repository}: holds none of {', '.join(names)}")
    return path


def fetch_if_there(repository: str, names: Sequence[str]) -> Path | None:
    """As `fetch`, but None where the repository has none of the files.

    What the cache holds is taken from there without asking the hub, so that a later run needs no network.
    """
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache  # noqa: PLC0415
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: PLC0415
    except ImportError as error:
        raise InputError(f"{PREFIX}{repository}: needs a package: pip install huggingface_hub") from error
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_redacted)
    owner_name, _, revision = repository.partition("@")
    unreachable: Exception | None = None

    def get(name: str) -> Path | None:
        nonlocal unreachable
        try:
            known = try_to_load_from_cache(owner_name, name, revision=revision or None)
            if known is not None:  # a path, or that the repository has no such file
                return Path(known) if isinstance(known, str) else None
            cached_only = unreachable is not None or constants.HF_HUB_OFFLINE
            return Path(hf_hub_download(owner_name, name, revision=revision or None, local_files_only=cached_only))
        except LocalEntryNotFoundError as error:  # also what an unreachable hub gives
            unreachable = unreachable or (error.__cause__ if isinstance(error.__cause__, Exception) else error)
        except EntryNotFoundError:
            pass
        except Exception as error:  # whatever the hub, a proxy or the disk answers
            raise InputError(f"{PREFIX}{repository}: {_reason(error)}") from error
        return None

    path = next((path for name in names if (path := get(name)) is not None), None)
    if path is None and unreachable is not None:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else one_line(unreachable)
        raise Unreachable(
            f"{PREFIX}{repository}: not in the cache of huggingface_hub, and the hub cannot be reached ({why}): check "
            "the network (HF_ENDPOINT names a mirror), or fetch the folder elsewhere and give it with --model_name"
        )
    return path and _verified(path)


class Unreachable(InputError):
    """No answer from the other side: another source may have the file."""


def cached(repository: str, names: Sequence[str]) -> Path | None:
    """The first of the files that the cache of huggingface_hub holds; None without one, or without the package."""
    try:
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415
    except ImportError:
        return None
    for name in names:
        path = try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return Path(path)
    return None


def _redacted(record: logging.LogRecord) -> bool:
    """Take passwords (of HF_ENDPOINT) out of what huggingface_hub logs."""
    record.msg, record.args = redact(record.getMessage()), ()
    return True


def _reason(error: Exception) -> str:
    """What went wrong, in words that say what to do; the hub's own are pages."""
    reasons = {
        "RepositoryNotFoundError": "no such model on the hub, or a private one (log in with `hf auth login`)",
        "GatedRepoError": "its owner asks for a consent first: open its page, then log in with `hf auth login`",
        "RevisionNotFoundError": "has no such revision",
        "HFValidationError": "not of the form owner/name",
    }
    for kind in type(error).__mro__:
        if kind.__name__ in reasons:
            return reasons[kind.__name__]
    return f"cannot be fetched ({one_line(error)}): run this again, what has arrived is kept"


def _verified(path: Path) -> Path:
    """The cache names a large file after its SHA-256, which the hub gave; `InputError` where it is not right."""
    expected = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", expected) and sha256_file(path) != expected:
        raise InputError(f"{path}: wrong SHA-256, so damaged: delete {path.resolve()} and run this again")
    return path
