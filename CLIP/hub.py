"""The Hugging Face hub, through huggingface_hub (optional): its cache, resuming, mirror and offline settings apply.

Nothing here imports torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from utils import InputError, one_line, redact, sha256_file

PREFIX = "hf-hub:"
WEIGHT_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "model.safetensors", "pytorch_model.bin",
)  # fmt: skip
REASONS = {  # the hub's own words are pages
    "RepositoryNotFoundError": "no such model on the hub, or a private one (log in with `hf auth login`)",
    "GatedRepoError": "its owner asks for a consent first: open its page, then log in with `hf auth login`",
    "RevisionNotFoundError": "has no such revision",
    "HFValidationError": "not of the form owner/name",
}


class Unreachable(InputError):
    """No answer from the other side: another source may have the file."""


class Missing(InputError):
    """A repository that holds none of the files asked for."""


def fetch(repository: str, names: Sequence[str]) -> Path:
    """The first of the files `names` that the hub's `repository` (`owner/name`, `owner/name@revision`) has.

    What the cache holds is taken from there without asking the hub, so that a later run needs no network. `Missing`
    where the repository has none, `Unreachable` for no network and not in the cache, `InputError` for no such
    repository, a damaged file, no huggingface_hub.
    """
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache  # noqa: PLC0415
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: PLC0415
    except ImportError as error:
        raise InputError(f"{PREFIX}{repository}: needs a package: pip install huggingface_hub") from error
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_redacted)
    owner_name, _, revision = repository.partition("@")
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    for name in names:
        try:
            path = try_to_load_from_cache(owner_name, name, revision=revision or None)
            if path is None:  # not known there; what is no text says that the repository has no such file
                path = hf_hub_download(owner_name, name, revision=revision or None, local_files_only=bool(offline))
            if isinstance(path, str):
                return _verified(Path(path))
        except LocalEntryNotFoundError as error:  # noqa: PERF203 - also what an unreachable hub gives
            offline = offline or one_line(error.__cause__ or error)
        except EntryNotFoundError:
            continue
        except InputError:
            raise
        except Exception as error:  # whatever the hub, a proxy or the disk answers
            reasons = [REASONS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in REASONS]
            reasons.append(f"cannot be fetched ({one_line(error)}): run this again, what has arrived is kept")
            raise InputError(f"{PREFIX}{repository}: {reasons[0]}") from error
    if offline:
        raise Unreachable(
            f"{PREFIX}{repository}: not in the cache of huggingface_hub, and the hub cannot be reached ({offline}): "
            "check the network (HF_ENDPOINT names a mirror), or fetch the folder elsewhere and give it as --model_name"
        )
    raise Missing(f"{PREFIX}{repository}: holds none of {', '.join(names)}")


def cached(repository: str, names: Sequence[str]) -> Path | None:
    """The first of the files that the cache of huggingface_hub holds; None without one, or without the package."""
    try:
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415
    except ImportError:
        return None
    paths = (try_to_load_from_cache(repository, name) for name in names)
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def _redacted(record: logging.LogRecord) -> bool:
    """Take passwords (of HF_ENDPOINT) out of what huggingface_hub logs."""
    record.msg, record.args = redact(record.getMessage()), ()
    return True


def _verified(path: Path) -> Path:
    """The cache names a large file after its SHA-256, which the hub gave; `InputError` where it is not right."""
    expected = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", expected) and sha256_file(path) != expected:
        raise InputError(f"{path}: wrong SHA-256, so damaged: delete {path.resolve()} and run this again")
    return path
