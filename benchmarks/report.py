"""From what trials measured to figures, verdicts and tables. No measuring here.

Targets are those of the issue that asked for them; each is printed beside its figure, with ``ok`` or ``MISSED``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from workload import ITERATION_S

THREAD_S: Final = 1e-3
THREAD_BASE_S: Final = 0.5e-3
THREAD_PER_TENSOR_S: Final = 1e-6
OVERHEAD: Final = 0.02
COPY_SHARE: Final = 0.90
RESTORE_SHARE: Final = 0.70
IMAGES: Final = 2
MEMORY_MARGIN: Final = 0.05
CASES: Final = (("sleep", 1), ("sleep", 5), ("compute", 1), ("compute", 5))


@dataclass(slots=True)
class Measured:
    """Everything about one size: per round, every contender's result (see ``trial``), and one restart."""

    state_bytes: int
    rounds: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[dict[str, Any]] = field(default_factory=list)

    def results(self, contender: str) -> list[dict[str, Any]]:
        """What *contender* measured, round by round; failed trials are left out."""
        return [r[contender] for r in self.rounds if "error" not in r.get(contender, {"error": ""})]

    def segments(self, contender: str, mode: str, every: int) -> list[dict[str, Any]]:
        """Its segments of one case."""
        return [s for r in self.results(contender) for s in r["segments"] if (s["mode"], s["every"]) == (mode, every)]

    @property
    def tensors(self) -> int:
        """How many tensors the state has."""
        return int(next((r["tensors"] for r in self.results("none")), 0))


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target: the figure, the limit, whether it was met (None: it does not apply), and why."""

    what: str
    figure: str
    limit: str
    met: bool | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One contender in one mode at one interval; medians over rounds. ``overhead`` is a share, None without a twin."""

    iteration_s: float
    overhead: float | None
    blocked_s: list[float]
    cpu_s: list[float]
    stall_s: list[float]
    copy_s: list[float]
    taken: int
    skipped: dict[str, int]


def case(measured: Measured, contender: str, mode: str, every: int) -> Case | None:
    """The figures of one case, or None if there are none."""
    segments = measured.segments(contender, mode, every)
    if not segments:
        return None
    ratios = []
    for done in measured.rounds:
        pair = [_segment(done.get(c), mode, every) for c in (contender, "none")]
        if pair[0] and pair[1]:
            ratios.append(_iteration_s(pair[0]) / _iteration_s(pair[1]) - 1)
    skipped: dict[str, int] = {}
    for segment in segments:
        for reason, count in segment["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + count
    return Case(
        iteration_s=median(map(_iteration_s, segments)),
        overhead=median(ratios) if ratios else None,
        blocked_s=[t for s in segments for t in _per_snapshot(s, "ends_s", "hooks_s")],
        cpu_s=[t for s in segments for t in _per_snapshot(s, "ends_cpu_s", "hooks_cpu_s")],
        stall_s=[t for s in segments for t in s["stall_s"]],
        copy_s=[t for s in segments for t in s["copy_s"]],
        taken=sum(sum(s["took"]) for s in segments),
        skipped=skipped,
    )


def _segment(result: dict[str, Any] | None, mode: str, every: int) -> dict[str, Any] | None:
    segments = (result or {}).get("segments", [])
    return next((s for s in segments if (s["mode"], s["every"]) == (mode, every)), None)


def _iteration_s(segment: dict[str, Any]) -> float:
    return float(segment["wall_s"]) / int(segment["iterations"])


def _per_snapshot(segment: dict[str, Any], ends: str, hooks: str) -> Iterator[float]:
    """What each snapshot cost the training thread: at the end of its step, and before the next step of the optimizer."""
    for i, took in enumerate(segment["took"][:-1]):
        if took:
            yield segment[ends][i] + segment[hooks][i + 1]


# -- verdicts ------------------------------------------------------------------------------------------------------------


def judge(measured: Measured) -> list[Verdict]:
    """Every target at this size."""
    return [*_thread(measured), *_overhead(measured), *_bandwidth(measured), *_memory(measured)]


def _thread(measured: Measured) -> Iterator[Verdict]:
    limit_s = min(THREAD_S, THREAD_BASE_S + THREAD_PER_TENSOR_S * measured.tensors)
    for mode, every in CASES:
        found = case(measured, "holdfast", mode, every)
        if found is not None and found.blocked_s:
            blocked_s = median(found.blocked_s)
            note = f"{_ms(median(found.cpu_s))} of it computing"
            if not _fits(found):
                note += f"; the copy ({_ms(median(found.copy_s))}) is longer than the window"
            yield Verdict(
                f"training thread, {mode}, every {every}",
                _ms(blocked_s),
                f"<= {_ms(limit_s)}",
                blocked_s <= limit_s,
                note,
            )


def _overhead(measured: Measured) -> Iterator[Verdict]:
    found = case(measured, "holdfast", "sleep", 1)
    if found is None or found.overhead is None:
        return
    fits = _fits(found)
    yield Verdict(
        "end to end, sleep, every 1",
        f"{found.overhead:+.1%}",
        f"<= {OVERHEAD:.0%}",
        found.overhead <= OVERHEAD if fits else None,
        f"{found.taken} taken, {sum(found.skipped.values())} skipped"
        if fits
        else f"the copy ({_ms(median(found.copy_s))}) does not fit into {ITERATION_S * 1e3:.0f} ms",
    )


def _fits(found: Case) -> bool:
    """Whether the copy ended within the iteration."""
    return not found.copy_s or median(found.copy_s) < ITERATION_S


def _bandwidth(measured: Measured) -> Iterator[Verdict]:
    ways = (
        ("copy into the slot", "into_slot", "limit", COPY_SHARE),
        ("restore", "restore", "restore_limit", RESTORE_SHARE),
    )
    for what, figure, limit, least in ways:
        pairs = [
            (value, most)
            for result in measured.results("holdfast")
            for value, most in zip(result["bandwidth"][figure], result["bandwidth"][limit], strict=True)
        ]
        if pairs:
            share = median(value / most for value, most in pairs)
            value, most = median(p[0] for p in pairs), median(p[1] for p in pairs)
            yield Verdict(
                what, f"{share:.0%} of copy_", f">= {least:.0%}", share >= least, f"{_gbs(value)}, copy_ {_gbs(most)}"
            )


def _memory(measured: Measured) -> Iterator[Verdict]:
    bare = [r["pss_bytes"] for r in measured.results("none")]
    both = [(r["pss_bytes"], r["agent_pss_bytes"]) for r in measured.results("holdfast")]
    if bare and both:
        more = median(map(sum, both)) - median(bare)
        limit = IMAGES * measured.state_bytes * (1 + MEMORY_MARGIN)
        yield Verdict(
            "host memory (PSS) beyond training",
            f"{more / 1e6:.0f} MB = {more / measured.state_bytes:.2f} images",
            f"<= {limit / 1e6:.0f} MB",
            more <= limit,
            f"trainer {median(b[0] for b in both) / 1e6:.0f}, agent {median(b[1] for b in both) / 1e6:.0f}, "
            f"bare trainer {median(bare) / 1e6:.0f} MB",
        )


# -- tables --------------------------------------------------------------------------------------------------------------


def show(measured: Measured) -> None:
    """Print everything about one size."""
    print(f"\n== {measured.state_bytes / 1e6:.0f} MB in {measured.tensors} tensors, {len(measured.rounds)} rounds ==\n")
    print(_row("mode every contender", "iteration", "overhead", "blocked", "(max)", "(cpu)", "taken") + "  skipped")
    contenders = list(dict.fromkeys(c for done in measured.rounds for c in sorted(done, key=_order)))
    for mode, every in CASES:
        for contender in contenders:
            if (found := case(measured, contender, mode, every)) is not None:
                print(_case_row(f"{mode:8}{every:<3}{contender}", found))
    for done in measured.rounds:
        for contender, result in done.items():
            if "error" in result:
                print(f"  {contender} failed: {result['error']}")
    for line in _details(measured):
        print(line)
    print()
    for verdict in judge(measured):
        word = {True: "ok", False: "MISSED", None: "n/a"}[verdict.met]
        print(f"{verdict.what:36}{verdict.figure:>26}  {verdict.limit:>12}  {word:7}{verdict.note}")


def _order(contender: str) -> int:
    known = ("none", "holdfast", "torch.save", "dcp", "dcp-staged", "dcp-thread")
    return known.index(contender) if contender in known else len(known)


def _row(what: str, *cells: str) -> str:
    return f"{what:24}" + "".join(f"{cell:>11}" for cell in cells)


def _case_row(what: str, found: Case) -> str:
    blocked = ["", "", ""]
    if found.blocked_s:
        blocked = [_ms(median(found.blocked_s)), _ms(max(found.blocked_s)), _ms(median(found.cpu_s))]
    return _row(
        what,
        _ms(found.iteration_s),
        "" if found.overhead is None else f"{found.overhead:+.1%}",
        *blocked,
        str(found.taken),
    ) + "".join(f"  {count} {reason}" for reason, count in found.skipped.items())


def _details(measured: Measured) -> Iterator[str]:
    for mode, every in CASES:
        found = case(measured, "holdfast", mode, every)
        if found is not None and found.stall_s and every == 1:
            outside = [
                e + h
                for s in measured.segments("holdfast", mode, every)
                for e, h in zip(s["ends_s"][1:], s["hooks_s"][1:], strict=True)
            ]
            copies = f"; copies in the window {_ms(median(found.copy_s))}" if found.copy_s else ""
            yield (
                f"{mode}: stats().stall_s per step {_ms(median(found.stall_s))} (max {_ms(max(found.stall_s))}); the same "
                f"by a timer outside {_ms(median(outside))} (max {_ms(max(outside))}){copies}"
            )
    bandwidths = [r["bandwidth"] for r in measured.results("holdfast")]
    if bandwidths:
        limit = median(v for b in bandwidths for v in b["limit"] + b["restore_limit"])
        every_thread = median(b["limit_all_threads"] for b in bandwidths)
        yield (
            f"limit: torch.Tensor.copy_ of {bandwidths[0]['limit_bytes'] / 1e6:.0f} MB between resident buffers: "
            f"{_gbs(limit)} on one thread, {_gbs(every_thread)} on {os.cpu_count()}"
        )
        yield "restore into the live model: " + _restore_stages([s for b in bandwidths for s in b["restore_split_s"]])
        yield f"attach: {_ms(median(r['attach_s'] for r in measured.results('holdfast')))}"
    yield from _restarts(measured)


def _restarts(measured: Measured) -> Iterator[str]:
    done = [r for r in measured.restarts if "error" not in r]
    yield from (f"restart failed: {r['error']}" for r in measured.restarts if "error" in r)
    if done:
        total_s = median(sum(r["stages_s"].values()) for r in done)
        yield f"kill to first restored step: {total_s:.2f} s: " + _stages([r["stages_s"] for r in done])
        restore_s = median(r["restore_s"] for r in done)
        yield f"  the restore alone, into an optimizer without state: {_gbs(measured.state_bytes / restore_s)}"


def _restore_stages(splits: Iterable[dict[str, float]]) -> str:
    """Medians by stage, with what they consist of, and what no stage explains."""
    found = _medians(splits)
    parts = {"prepare": ("open the images", "plan"), "verify and copy": ("checksums",)}
    inner = {part for names in parts.values() for part in names}
    outer = [stage for stage in found if stage not in inner and stage != "all"]
    texts = [
        f"{stage} {_ms(found[stage])}"
        + "".join(f" (of which {part} {_ms(found[part])})" for part in parts.get(stage, ()) if part in found)
        for stage in outer
    ]
    rest_s = found["all"] - sum(found[stage] for stage in outer)
    return f"{_ms(found['all'])}: " + ", ".join([*texts, f"rest {_ms(rest_s)}"])


def _stages(splits: Iterable[dict[str, float]]) -> str:
    return ", ".join(f"{stage} {_ms(seconds)}" for stage, seconds in _medians(splits).items())


def _medians(splits: Iterable[dict[str, float]]) -> dict[str, float]:
    """Medians by stage."""
    stages: dict[str, list[float]] = {}
    for split in splits:
        for stage, seconds in split.items():
            stages.setdefault(stage, []).append(seconds)
    return {stage: median(seconds) for stage, seconds in stages.items()}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.0995 else f"{seconds * 1e3:.0f} ms"


def _gbs(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"
