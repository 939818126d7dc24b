"""The journal of a search: Optuna's, on disk, for one process at a time. Finished trials outlive any end of it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from slipcast.errors import ArtifactError, ResourceError

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

JOURNAL, LOCK, HOLDER = "journal.log", "lock", "holder"
FOUND = "found"  # the attribute with all that is known of a finished trial
STUDY = "search"


@contextlib.contextmanager
def open_journal(folder: Path) -> Iterator[Study]:
    """The study in `folder`, which minimises two values. ResourceError where another process has it.

    It holds finished trials alone, a line each; one that a killed process was about to write is cut off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), warnings.catch_warnings():
        import optuna
        from optuna.storages.journal import JournalFileBackend

        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.WARNING)

        _cut(folder / JOURNAL)
        try:
            lock: Any = _Held()
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL), lock_obj=lock))
            study = optuna.create_study(
                storage=storage, study_name=STUDY, directions=["minimize", "minimize"], load_if_exists=True
            )
        except (ValueError, KeyError) as error:
            raise ArtifactError(
                f"{folder / JOURNAL}: damaged",
                expected="Optuna's journal",
                got=str(error),
                hint="remove the directory: the search begins anew",
            ) from None
        yield study


def keep(study: Study, params: dict[str, Any], distributions: dict[str, Any], found: dict[str, Any]) -> None:
    """Write a finished trial. Its values are `objective` and `distance`; one with an `error` has none."""
    from optuna.trial import TrialState, create_trial

    values = None if "error" in found else [found["objective"], found["distance"]]
    state = TrialState.FAIL if "error" in found else TrialState.COMPLETE
    study.add_trial(
        create_trial(state=state, values=values, params=params, distributions=distributions, user_attrs={FOUND: found})
    )


def finished(study: Study) -> list[FrozenTrial]:
    """Trials in their order, with values or, where something is wrong with the point, without."""
    return list(study.get_trials(deepcopy=False))


def seconds_spent(study: Study) -> float:
    """What finished trials took, in all runs of the search; what was killed does not count."""
    return float(sum(trial.user_attrs[FOUND]["took_s"] for trial in finished(study)))


def told(trial: FrozenTrial) -> dict[str, Any]:
    """All that is known of a finished trial; see evaluate.py, and `error` of those that have no values."""
    found: dict[str, Any] = trial.user_attrs[FOUND]
    return found


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A lock that ends with its process, however that ends."""
    lock = FileLock(folder / LOCK, blocking=False)
    holder = folder / HOLDER  # beside the lock, since Windows lets nobody read a file that is locked
    try:
        lock.acquire()
    except Timeout:
        found = holder.read_text() if holder.exists() else "unknown"
        raise ResourceError(
            f"{folder}: the same search is running",
            got=f"process {found}",
            hint="wait for it: its result is taken from there",
        ) from None
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


class _Held:
    """In place of Optuna's locks, files that whoever is killed leaves behind: the folder is locked already."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _cut(journal: Path) -> None:
    """Drop what stands behind the last whole line."""
    if journal.exists():
        data = journal.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with journal.open("r+b") as stream:
                stream.truncate(whole)
