"""Checks and measurements of a part: time budgets, pass or fail, and rows of CSVs.

A check is a function that yields its cases, the important ones first; a case yields outcomes, which pass or fail, and
measurements, which are rows of a table. What a check or the part has no time for is reported, not dropped.
"""

import importlib
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from bench.harness import environment, read_rows, write_rows


class Outcome(NamedTuple):
    """A result that passes if value <= limit; nan fails. A limit of inf only reports the value."""

    what: str
    value: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


def largest(values: Iterable[float]) -> float:
    """Largest value; nan if there is one, which `max` may lose."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


class Measurement(NamedTuple):
    """A row of the table gpu_<table>.csv; columns on hardware and versions are added."""

    table: str
    row: dict


class Skipped(NamedTuple):
    """A case that cannot run on the device."""

    reason: str


class Case(NamedTuple):
    """One case of a check."""

    name: str
    run: Callable[[], Iterable[Outcome | Measurement | Skipped]]


@dataclass(frozen=True)
class Setup:
    """Where the checks run."""

    device: torch.device
    small: bool
    """Small sizes, for a dry run on a CPU."""
    scratch: Path
    """Folder for shards and runs, deleted at the end."""
    out: Path
    """Folder of the results."""


class Check(NamedTuple):
    """A function that yields the cases of a check, and what it needs.

    `seconds` is the time after which no further case starts; `needs` are modules without which the check is skipped.
    """

    cases: Callable[[Setup], Iterable[Case]]
    seconds: float
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.cases.__name__


@dataclass
class Report:
    """Results of one part, printed and written to CSVs as they arrive.

    Args:
        part: name of the part; its rows replace those of its last run, and rows of other parts stay, like those of
            checks that do not run.
        device: device that the rows describe.
        out: folder of the CSVs.
    """

    part: str
    device: torch.device
    out: Path
    rows: dict[str, list[dict]] = field(default_factory=lambda: {"checks": []})

    def add(self, table: str, row: dict) -> None:
        self.rows.setdefault(table, []).append({"part": self.part, **row, **gpu_environment(self.device)})

    def status(self, check: str, case: str, status: str, note: str = "", **values: float | str) -> None:
        values = dict.fromkeys(("what", "value", "limit", "seconds"), "") | values
        self.add("checks", {"check": check, "case": case, "status": status, **values, "note": note})

    def write(self) -> None:
        for table, rows in self.rows.items():
            run = {row.get("check") for row in rows}
            others = [
                row
                for row in read_rows(f"gpu_{table}", self.out)
                if row["part"] != self.part or row.get("check") not in run
            ]
            write_rows(f"gpu_{table}", others + rows, self.out)

    def failures(self) -> int:
        return sum(row["status"] == "failed" for row in self.rows["checks"])


def run_part(checks: list[Check], setup: Setup, report: Report, seconds: float) -> bool:
    """Run the checks of a part within `seconds`; returns whether none failed.

    If their times add up to more, each has its share, and the last one what is left.
    """
    deadline = time.monotonic() + seconds
    share = min(1.0, seconds / max(1e-9, sum(check.seconds for check in checks)))
    usable = True
    for check in checks:
        started = time.monotonic()
        limit = deadline if check is checks[-1] else min(started + share * check.seconds, deadline)
        before = len(report.rows["checks"])
        missing = [module for module in check.needs if not imports(module)]
        if missing:
            report.status(check.name, "", "skipped", f"{' and '.join(missing)} can't be imported")
        elif not usable:
            report.status(check.name, "", "not reached", "the device failed")
        elif started >= deadline:
            report.status(check.name, "", "not reached", "the time of the part was up")
        else:
            usable = _run_check(check, setup, report, limit)
        report.write()
        _print_check(check.name, report.rows["checks"][before:], time.monotonic() - started)
    return report.failures() == 0


def _run_check(check: Check, setup: Setup, report: Report, limit: float) -> bool:
    """Run cases until `limit`; returns whether the device can still be used."""
    cases: list[Case] = []
    try:
        cases = list(check.cases(setup))
    except Exception as error:  # a check that breaks is reported like one that fails, and the others still run
        traceback.print_exc()
        report.status(check.name, "", "failed", _sentence(error))
    else:
        if not cases:
            report.status(check.name, "", "skipped", "nothing to check with the packages that are installed")
    remaining = iter(cases)
    for case in remaining:
        if time.monotonic() >= limit:
            left = [case.name, *(other.name for other in remaining)]
            report.status(check.name, "", "not reached", f"no time for {len(left)} cases: {', '.join(left[:4])} ...")
            break
        started = time.monotonic()
        try:
            for result in case.run():
                if isinstance(result, Measurement):
                    report.add(result.table, {"check": check.name, **result.row})
                    continue
                if isinstance(result, Skipped):
                    report.status(check.name, case.name, "skipped", result.reason)
                    continue
                numbers = {"what": result.what, "value": f"{result.value:.4g}", "limit": f"{result.limit:.4g}"}
                status = "passed" if result.passed else "failed"
                took = {"seconds": round(time.monotonic() - started, 2)}
                report.status(check.name, case.name, status, result.note, **numbers, **took)
        except Exception as error:
            traceback.print_exc()
            report.status(check.name, case.name, "failed", _sentence(error))
            if not _device_works(setup.device):
                report.status(check.name, "", "not reached", f"the device failed in {case.name}")
                return False
        report.write()  # the machine may be taken away during the next one
    return True


def _device_works(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:  # after an illegal access, every later call fails
        torch.cuda.synchronize(device)
        return True
    except RuntimeError:
        return False


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _print_check(name: str, rows: list[dict], seconds: float) -> None:
    counts = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
    whole = next((row["status"] for row in rows if not row["case"]), "done")  # of the check, not of one of its cases
    verdict = "FAIL" if counts["failed"] else "pass" if counts["passed"] else whole
    counted = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    print(f"{verdict:>11}  {name}: {counted or 'measured'} ({seconds:.0f} s)", flush=True)
    for row in rows:
        if row["status"] != "passed" or (row["note"] and row["limit"] == "inf"):
            value = row["what"] and f"{row['what']} {row['value']}, limit {row['limit']}"
            print(f"{'':13}{row['status']}: {', '.join(filter(None, (row['case'], value, row['note'])))}", flush=True)


STATUSES = ("passed", "failed", "skipped", "not reached")


def imports(module: str) -> bool:
    """Whether a module can be imported: an installed one may still fail, for example next to another CUDA."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True


def gpu_environment(device: torch.device) -> dict[str, str | int]:
    """`environment`, and the versions that matter on a GPU."""
    versions = {"cuda": torch.version.cuda or ""}
    for package in ("triton", "torchvision", "timm", "accelerate", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    return environment(device) | versions
