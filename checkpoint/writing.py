"""Writing one checkpoint on all ranks together: all of it is there in the end on every rank, or none of it on any."""

import errno
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from checkpoint.keeping import Keeping
from checkpoint.peers import Peers, error_of, trouble_of
from checkpoint.sealed import begin, seal, write_text
from checkpoint.snapshot import Snapshot
from checkpoint.tensor_file import WrittenFile
from settings import Refusal

JSON: TypeAlias = Any
SLACK_BYTES = 1 << 20  # JSON, headers and the file system's own blocks
_under_way: set[Future[None]] = set()


@dataclass(frozen=True)
class Writing:
    """One checkpoint on its way to the disk."""

    target: Path
    shot: Snapshot
    facts: Mapping[str, JSON]
    """About the checkpoint, for its manifest."""
    texts: Mapping[str, str]
    """Small files and their content."""
    numbers: str
    """The numbers of this rank's optimizers, as JSON; all ranks' together become optimizer.json."""
    peers: Peers
    keeping: Keeping

    def start(self, thread: Executor) -> Future[None]:
        """Write while something else is done; all ranks have to call. Raises Refusal as `begin` does."""
        self.begin()
        future = thread.submit(self.finish)
        _under_way.add(future)
        future.add_done_callback(_under_way.discard)
        return future

    def begin(self) -> None:
        """Make room; all ranks have to call. Raises Refusal, on all of them, where there is too little."""

        def make_room() -> None:
            if self.peers.is_main:
                if self._needed > shutil.disk_usage(self.target.parent).free:
                    raise self._disk_full()
                try:
                    begin(self.target)
                except OSError as error:
                    raise self._refusal(error) from error

        self.peers.agree(make_room)

    def finish(self) -> None:
        """Write everything and put the folder in its place, then remove what is old; all ranks have to call.

        Raises Refusal on all of them, with the partial folder removed, where one could not write.
        """
        under_way = self.shot.send()
        words: dict[str, JSON] = {"files": [], "numbers": self.numbers, "trouble": None}
        try:
            words["files"] = [asdict(file) for file in self.shot.write(self._partial)]
        except Exception as error:
            words["trouble"] = trouble_of(self._told(error))
        answers = self.peers.tell(words)
        trouble = self.peers.tell(self._conclude(answers) if self.peers.is_main else None)[0]
        if trouble is not None:
            raise error_of(trouble, 0)
        for sent in under_way:
            sent.wait()
        if self.peers.is_main:  # nobody waits for it, who may have to read old checkpoints
            self.keeping.prune(self.target)

    def _conclude(self, answers: list[dict[str, JSON]]) -> list[str] | None:
        """On the main rank: seal what all ranks have written, or remove it; returns what went wrong."""
        trouble = next((said["trouble"] for said in answers if said["trouble"]), None)
        if trouble is None:
            try:
                files = [WrittenFile(**file) for said in answers for file in said["files"]]
                texts = {**self.texts, "optimizer.json": _merged([json.loads(said["numbers"]) for said in answers])}
                files += [write_text(self._partial, name, text) for name, text in texts.items()]
                seal(self._partial, self.target, files, self.facts)
            except Exception as error:
                trouble = trouble_of(self._told(error))
        if trouble is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        return trouble

    @property
    def _partial(self) -> Path:
        return self.target.with_name(f".partial_{self.target.name}")

    @property
    def _needed(self) -> int:
        return self.shot.num_bytes + SLACK_BYTES

    def _told(self, error: Exception) -> Exception:
        """The error as the user can mend it, where he can."""
        return self._refusal(error) if isinstance(error, OSError) else error

    def _refusal(self, error: OSError) -> Refusal:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return self._disk_full()
        rank = f"rank {self.peers.rank}: " if self.peers.size > 1 else ""
        return Refusal(
            f"{self.target}: could not be written: {rank}{error.strerror or error}; {self._kept()}. Mend that and start"
            " the same command again"
        )

    def _disk_full(self) -> Refusal:
        folder = self.target.parent
        return Refusal(
            f"{self.target}: the disk is full: a checkpoint needs {_megabytes(self._needed)},"
            f" {_megabytes(shutil.disk_usage(folder).free)} are free in {folder}; {self._kept()}. Free some space there"
            " (or lower checkpoint.keep) and start the same command again"
        )

    def _kept(self) -> str:
        if not self.peers.is_main:  # it alone knows them
            return "earlier checkpoints are intact"
        good = self.keeping.last_good()
        return f"the last good checkpoint {good.name} is intact" if good else "there is no earlier checkpoint"


def settle() -> None:
    """Before this process ends, or a run begins where one fell over: wait for what is still being written."""
    wait(set(_under_way))


def _merged(numbers: list[JSON]) -> str:
    """The numbers of all ranks' optimizers: those that hold the same parameters say the same."""
    merged: dict[str, JSON] = {"numbers": {}, "untouched": []}
    for said in numbers:
        merged["numbers"] |= said["numbers"]
        merged["untouched"] += [name for name in said["untouched"] if name not in merged["untouched"]]
    return json.dumps(merged, indent=1)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
