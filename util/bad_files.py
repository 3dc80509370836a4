"""Unreadable files of a run, merged over the ranks and listed in bad_videos.csv.

Files that hang a loader worker or kill it twice are also listed in quarantine.csv: see
data/watchdog.py.
"""

from pathlib import Path

from util.dist import UserError, all_gather_object, print0, rank
from util.files import append_rows, read_rows


class BadFiles:
    """The files of a run that could not be read, or had many undecodable frames."""

    def __init__(self, folder: Path, limit: float):
        """Start with no bad files.

        folder: --output_dir. limit: the run stops if more files are unreadable.
        """
        self.path = folder / "bad_videos.csv"
        self.limit = limit
        self.unreadable: dict[str, str] = {}  # path: reason
        self.damaged: dict[str, str] = {}  # read, but with many frames replaced
        self.warned = False  # that bad_videos.csv is damaged

    def add_batch(self, batch: dict) -> None:
        """Remember the bad files of this rank's batch. Raises UserError if there are too many."""
        self.unreadable.update(batch["bad"])
        self.damaged.update(batch["damaged"])
        if batch["clips"] is None:
            problem = f"no readable file found in {len(batch['bad'])} tries"
        elif len(self.unreadable) > self.limit:
            count = len(self.unreadable)
            problem = f"{count} files cannot be read, more than --max_bad_frac allows"
        else:
            return
        self._append_new(self.unreadable)
        path, reason = next(iter(self.unreadable.items()))
        message = f"{problem}, for example {path}: {reason}; all in {self.path}"
        raise UserError(message, print_on_any_rank=True)

    def gather(self) -> int:
        """Merge the bad files of all ranks and list the new ones. Call on every rank.

        Returns the number of unreadable files.
        """
        for unreadable, damaged in all_gather_object((self.unreadable, self.damaged)):
            self.unreadable.update(unreadable)
            self.damaged.update(damaged)
        if rank() == 0:
            self._append_new(self.damaged | self.unreadable)
        return len(self.unreadable)

    def _append_new(self, reasons: dict[str, str]) -> None:
        """Append the files that bad_videos.csv does not list yet."""
        listed = self._already_listed()
        rows = [(path, reason) for path, reason in sorted(reasons.items()) if path not in listed]
        if not rows:
            return
        if not listed:
            rows.insert(0, ("path", "reason"))
        try:
            append_rows(self.path, rows)
        except OSError as error:
            print0(f"warning: could not write {self.path.name} ({error.strerror or error})")

    def _already_listed(self) -> set[str]:
        """Return the first column of bad_videos.csv, with a warning if it has other lines."""
        rows, problem = read_rows(self.path)
        if problem and not self.warned:
            self.warned = True
            print0(f"warning: {self.path} is damaged ({problem}): remove these lines or the file")
        return {path for path, _ in rows}
