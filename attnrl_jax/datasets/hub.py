"""Files from the Hugging Face hub, by the name `hf:OWNER/NAME[@REVISION]`."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from attnrl_jax.tasks.problems import DataError

_NAME = re.compile(
    r"hf:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^@:]+))?(:(?P<pattern>.+))?", re.ASCII
)
# JSON files that the `datasets` library keeps beside the problems.
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Weights and text only: nothing that is run when it is read (pickles, Python).
_MODEL_FILES = (".safetensors", ".json", ".txt", ".jinja", ".model")


def data_files(name: str, formats: Sequence[str]) -> list[Path]:
    """Downloads the files of problems of a dataset repository, or finds them in the hub's cache.

    Args:
      name: `hf:OWNER/NAME[@REVISION][:PATTERN]`. Taken are the files of `formats` whose path in
        the repository matches the pattern (`*`, `?`, `[...]`; `*` matches `/` too); without one
        those with `train` in their path, or all if there are none.
      formats: endings of file names.

    Returns:
      their paths in the hub's cache, sorted.

    Raises:
      DataError: a name of another form; no such repository or no access to it; no usable file in
        it; or the hub cannot be reached and the files are not in its cache.
    """
    repository, revision, pattern = _parse(name)

    def choose(files: list[str]) -> list[str]:
        usable = [
            file
            for file in files
            if file.lower().endswith(tuple(formats)) and PurePosixPath(file).name not in _ABOUT_DATA
        ]
        if pattern:
            chosen = [file for file in usable if fnmatch.fnmatchcase(file, pattern)]
        else:
            chosen = [file for file in usable if "train" in file.lower()] or usable
        if not chosen:
            wanted = f"matches {pattern!r} and ends in" if pattern else "ends in"
            raise DataError(
                f"{name}: no file of the repository {wanted} {', '.join(formats)}; "
                f"it has: {_some(files)}"
            )
        return chosen

    return _download(name, repository, "dataset", revision, choose)[1]


def model_folder(name: str) -> Path:
    """The folder of a model: a path as it is, `hf:OWNER/NAME[@REVISION]` after its download.

    Only safetensors, JSON, text, template and tokenizer files of the repository's top folder are
    downloaded, never pickles or Python files.

    Raises:
      DataError: as `data_files`; or the repository has no `config.json` or no safetensors.
    """
    if not name.startswith("hf:"):
        return Path(name)
    repository, revision, pattern = _parse(name)
    if pattern:
        raise DataError(f"{name}: a model is named hf:OWNER/NAME[@REVISION], without a pattern")

    def choose(files: list[str]) -> list[str]:
        chosen = [file for file in files if "/" not in file and file.endswith(_MODEL_FILES)]
        if "config.json" not in chosen or not any(f.endswith(".safetensors") for f in chosen):
            raise DataError(
                f"{name}: not a model that can be used: config.json and *.safetensors are needed; "
                f"the repository has: {_some(files)}"
            )
        return chosen

    return _download(name, repository, "model", revision, choose)[0]


def _parse(name: str) -> tuple[str, str | None, str | None]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(
            f"{name}: names of the hub have the form hf:OWNER/NAME, hf:OWNER/NAME@REVISION or "
            "hf:OWNER/NAME@REVISION:PATTERN"
        )
    return match["repository"], match["revision"], match["pattern"]


def _download(
    name: str,
    repository: str,
    kind: str,
    revision: str | None,
    choose: Callable[[list[str]], list[str]],
) -> tuple[Path, list[Path]]:
    """The snapshot's folder and the chosen files in it."""
    # Imported here: it takes a second, which library users of local files need not pay.
    from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download

    try:
        try:
            # Not `list_repo_files`, which tries for half a minute where there is no network.
            ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
            about = ask(repository, revision=revision, timeout=20)
            files = [file.rfilename for file in about.siblings or ()]
            offline = None
        except Exception as error:
            offline = _unreachable(name, kind, error)
            files = [
                file.path
                for file in get_cached_repo_tree(repository, repo_type=kind, revision=revision)
            ]
        chosen = choose([_inside(name, file) for file in files])
        # The names chosen, not patterns: a listing that has changed since adds nothing.
        folder = snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,
            allow_patterns=[glob.escape(file) for file in chosen],
            local_files_only=offline is not None,
        )
    except DataError:
        raise
    except Exception as error:  # the hub's client raises the errors of its HTTP library
        raise (offline or _unreachable(name, kind, error)) from error
    paths = [Path(folder, file) for file in sorted(chosen)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{name}: {missing[0].name} was not downloaded") from offline
    return Path(folder), paths


def _inside(name: str, file: str) -> str:
    """A file name of the hub, if it stays inside the folder it is downloaded into."""
    path = PurePosixPath(file.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DataError(f"{name}: the repository lists a file outside of itself: {file!r}")
    return file


def _unreachable(name: str, kind: str, error: Exception) -> DataError:
    """What an error of the hub's client means.

    Raises:
      DataError: the hub answered, and no cache can help.
    """
    from huggingface_hub import constants, errors

    instead = "a local file" if kind == "dataset" else "a local folder"
    hub = constants.ENDPOINT
    if isinstance(error, errors.HFValidationError):
        raise DataError(f"{name}: not a name of the hub: {error}") from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise DataError(f"{name}: the repository at {hub} has no such revision") from error
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.GatedRepoError) or status == 403:
        raise DataError(
            f"{name}: access to this {kind} at {hub} must be granted: ask for it on its page and "
            f"set HF_TOKEN, or give {instead}"
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        raise DataError(
            f"{name}: there is no such {kind} at {hub}, or it is private and HF_TOKEN, if set, "
            f"does not open it; give another name or {instead}"
        ) from error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(
        f"{name}: the hub at {hub} cannot be reached ({reason}), and the files are not in its "
        f"cache ({constants.HF_HUB_CACHE}); give {instead} instead"
    )


def _some(files: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(sorted(files)[:most]) or "none"
    return f"{shown}, and {len(files) - most} more" if len(files) > most else shown
