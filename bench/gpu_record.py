"""The rows of one call of the GPU benchmark as they come, in one file: what was measured, what failed, what was begun."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.race import Race
from bench.results import Result, Results, merge, read, write

__all__ = ["Record", "untimed"]


class Record:
    """gpu.json, written after every race: whatever stops a process costs the race that it was in.

    What is begun stands in a file beside it until it is finished. So a process that takes over names it as failed, and does
    not run into what ended the one before it.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path, self.begun_path = path, path.with_suffix(".begun")
        self.rows = Results(machine, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()), [])
        self.begun: list[str] = []
        if path.is_file():
            earlier = read(path)
            try:
                self.rows = merge([self.rows, earlier])
            except ValueError as reason:  # of another commit: kept, under another name
                print(reason, flush=True)
                path.rename(path.with_name(f"gpu-{earlier.machine['commit']}.json"))
        if self.begun_path.is_file():
            left = self.begun_path.read_text().splitlines()
            self.rows.wrong += [f"{label}: the process ended while this was measured" for label in left]
            self._write()

    def untried(self, race: Race) -> list[str]:
        """Providers of a race that have neither a time nor a reason to have none."""
        timed = {(*result.key, result.provider) for result in self.rows.results}
        return [
            name
            for name in race.names
            if (*race.key, name) not in timed
            and not any(line.startswith(f"{_label(*race.key, name)}: ") for line in self.rows.wrong)
        ]

    def begin(self, race: Race, name: str) -> None:
        """Before a provider is made; it stays begun until it has failed or finished."""
        self.begun.append(_label(*race.key, name))
        self.begun_path.parent.mkdir(parents=True, exist_ok=True)
        self.begun_path.write_text("\n".join(self.begun))

    def fail(self, race: Race, name: str, reason: str) -> None:
        """Why it has no time."""
        label = _label(*race.key, name)
        self.rows.wrong.append(f"{label}: {reason}")
        self.begun.remove(label)
        self._write()

    def finish(self, results: list[Result]) -> None:
        """Times of those that were begun."""
        if not results:
            return
        for result in results:
            self.begun.remove(_label(*result.key, result.provider))
        self.rows.results += results
        self._write()

    def release(self) -> None:
        """Forget what was begun and has neither failed nor finished: it may be tried again."""
        self.begun.clear()
        self.begun_path.unlink(missing_ok=True)

    def _write(self) -> None:
        """The rows, then what is still begun: stopped in between, a row is named twice and not lost."""
        write(self.rows, self.path)
        if self.begun:
            self.begun_path.write_text("\n".join(self.begun))
        else:
            self.begun_path.unlink(missing_ok=True)


def _label(suite: str, case: str, mode: str, name: str) -> str:
    return f"{suite} {case}, {mode}, {name}"


def untimed(found: Results, race: Race) -> list[str]:
    """Providers of a race that have no time in a file, whatever the reason."""
    timed = {result.provider for result in found.results if result.key == race.key}
    return [name for name in race.names if name not in timed]
