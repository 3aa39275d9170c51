"""What fronts say, as rows of text, as plain numbers, and as a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from eval.methods import TITLES
from eval.report.fronts import SHARES, Pair, front, front_with_base, levels
from eval.report.grid import LEAST_WAY, PRIMARY, Fronts, Grid, MethodFront
from eval.report.intervals import LEVEL, POWER, Array, Estimate, Interval, detectable_by, detectable_difference, verdict
from eval.report.lines import OURS, Line, differences
from eval.report.tables import text_of

LEAST_SHARED = 0.5  # of the way, for a verdict by lead
FEWER = "fewer settings"  # the verdict where ours is above a method with fewer
AREA = 0  # places of `measures`: the area, then prompt fidelity at each level of the subject, then the reverse
AT_SUBJECT = range(1, 1 + len(SHARES))
AT_PROMPT = range(1 + len(SHARES), 1 + 2 * len(SHARES))


def area_rows(fronts: Fronts) -> list[dict[str, str]]:
    """How far each front reaches, its area, and what our method's front has more."""
    return [
        {
            "size": each.budget or "",
            "method": TITLES[each.method],
            "settings": str(len(each.settings)),
            "subject (DINO) from – to": _reach(each.points, 0),
            "prompt (CLIP-T) from – to": _reach(each.points, 1),
            f"lead of {TITLES[OURS]}": _shown(each.lead, _no_lead(each, fronts), signed=True) if each.lead else "",
            "taken up to": "" if each.shared is None else f"{each.shared:.0%} of the way",
            "verdict": _verdict_of(each, fronts) if each.lead else "",
            "area ↑": _shown(each.estimates[AREA]),
            f"area, {TITLES[OURS]} − this": _shown(each.differences[AREA], signed=True) if each.differences else "",
        }
        for each in fronts.methods
    ]


def _verdict_of(each: MethodFront, fronts: Fronts) -> str:
    """In words whether our front leads; nothing is decided by a lead over a short piece of the way."""
    assert each.lead
    assert each.shared is not None
    found = _fair_verdict(each.lead, _has_fewer_settings(each, fronts))
    return "not decided" if found in ("ahead", "behind") and each.shared < LEAST_SHARED else found


def _has_fewer_settings(each: MethodFront, fronts: Fronts) -> bool:
    """Whether fewer settings of a method were tried than of ours. Further ones can only raise its front."""
    ours = next(one for one in fronts.methods if (one.method, one.budget) == (OURS, each.budget or "medium"))
    return len(each.settings) < len(ours.settings)


def _fair_verdict(difference: Estimate, fewer_settings: bool) -> str:
    """In words; we are not ahead of a method that was given fewer settings."""
    found = verdict(difference)
    return FEWER if found == "ahead" and fewer_settings else found


def prompt_rows(fronts: Fronts) -> list[dict[str, str]]:
    """Prompt fidelity at equal subject fidelity, and our method's minus each other one's."""
    at_subject, _ = levels(fronts.base, fronts.photos)
    return [_level_row(each, AT_SUBJECT, at_subject, 0, "DINO", fronts.base) for each in fronts.methods]


def subject_rows(fronts: Fronts) -> list[dict[str, str]]:
    """Subject fidelity at equal prompt fidelity, and our method's minus each other one's."""
    _, at_prompt = levels(fronts.base, fronts.photos)
    return [_level_row(each, AT_PROMPT, at_prompt, 1, "CLIP-T", fronts.base) for each in fronts.methods]


def _level_row(
    each: MethodFront, places: Iterable[int], at: Sequence[float], axis: int, score: str, base: Pair
) -> dict[str, str]:
    row = {"size": each.budget or "", "method": TITLES[each.method]}
    for place, level in zip(places, at, strict=True):
        column = f"at {score} {level:.3f}"
        row[column] = _shown(each.estimates[place], _beyond(each.points, axis, level, base))
        difference = each.differences[place] if each.differences else None
        row[f"{TITLES[OURS]} − this, {column}"] = (
            "" if difference is None or math.isnan(difference.interval.mean) else _shown(difference, signed=True)
        )
    return row


def _shown(estimate: Estimate, beyond: str = "", signed: bool = False) -> str:
    if math.isnan(estimate.interval.mean):
        return beyond or "no value: the ends are not in order"
    text = text_of(estimate.interval, signed)
    if estimate.interval.low is None and 0 < estimate.reached < 1:
        return text.replace("[–]", f"[–: {estimate.reached:.0%} of resamples reach it]")
    return text


def _reach(points: Array, axis: int) -> str:
    envelope = front(points)
    return f"{envelope[:, axis].min():.3f} – {envelope[:, axis].max():.3f}" if len(envelope) else "diverged"


def _beyond(points: Array, axis: int, level: float, base: Pair) -> str:
    """Why there is no value at a level."""
    if not len(front(points)):
        return "diverged"
    envelope = front_with_base(points, base)
    first, last = envelope[:, axis].min(), envelope[:, axis].max()
    return f"not reached: begins at {first:.3f}" if level < first else f"not reached: ends at {last:.3f}"


def setting_rows(fronts: Fronts, grid: Grid) -> list[dict[str, str]]:
    """Every setting of every method: its point, its balance, and whether it is on the method's front."""
    rows = []
    for each, group in zip(fronts.methods, grid.groups, strict=True):
        on_front = {tuple(point) for point in front_with_base(each.points, fronts.base)}
        for setting, point, balances in zip(each.settings, each.points, group.balances, strict=True):
            scored = not math.isnan(point[0])
            rows.append(
                {
                    "size": each.budget or "",
                    "method": TITLES[each.method],
                    "learning rate": f"{setting.learning_rate:g}",
                    "steps": str(setting.step),
                    "DINO": f"{point[0]:.3f}" if scored else "diverged",
                    "CLIP-T": f"{point[1]:.3f}" if scored else "diverged",
                    "balance": "diverged" if math.isnan(balances.mean()) else f"{balances.mean():.3f}",
                    "on the front": "✓" if tuple(point) in on_front else "",
                }
            )
    return rows


def chosen_rows(lines: Sequence[Line], grid: Grid) -> list[dict[str, str]]:
    """Which learning rate and step each subject is shown at: the best on all other subjects.

    lines: held out. grid: what they were chosen from. A rate at the edge of those that were tried says that a better
    one may lie beyond.
    """
    rates = {(group.method, group.budget): {s.learning_rate for s in group.settings} for group in grid.groups}
    rows = []
    for line in lines:
        if line.method in ("photos", "base"):
            continue
        tried = rates[line.method, line.budget]
        chosen = [line.result_of(subject)["cell"]["learning_rate"] for subject in grid.subjects]
        at_edge = sum(rate in (min(tried), max(tried)) for rate in chosen)
        shown = f"{at_edge} of {len(chosen)}" if len(tried) > 1 else ""  # one rate alone is no edge
        rows.append(
            {
                "size": line.budget or "",
                "method": line.name,
                "at the edge of its rates": shown,
                **{subject: _setting(line, subject) for subject in grid.subjects},
            }
        )
    return rows


def _setting(line: Line, subject: str) -> str:
    result = line.result_of(subject)
    if not line.scores["dino"]:
        return "diverged"
    return f"{result['cell']['learning_rate']:g}, step {result.get('stopped_at') or result['curve'][-1]['step']}"


def measure_rows(fronts: Fronts) -> list[dict[str, str]]:
    """Plain numbers: each measure of each front, with its bounds; empty where there is none."""
    at_subject, at_prompt = levels(fronts.base, fronts.photos)
    names = [("area", None), *(("clip_t", level) for level in at_subject), *(("dino", level) for level in at_prompt)]
    rows = []
    for each in fronts.methods:
        for place, (name, level) in enumerate(names):
            row = {"budget": each.budget or "", "method": each.method, "measure": name}
            row["at"] = "" if level is None else f"{level:.6f}"
            row |= _numbers("value", each.estimates[place])
            row |= _numbers("difference", each.differences[place] if each.differences else None)
            rows.append(row)
        row = {"budget": each.budget or "", "method": each.method, "measure": "lead", "at": ""}
        rows.append(row | _numbers("value", None) | _numbers("difference", each.lead))
    return rows


def _numbers(name: str, estimate: Estimate | None) -> dict[str, str]:
    interval = estimate.interval if estimate else Interval(math.nan, None, None)
    values = {"": interval.mean, "_low": interval.low, "_high": interval.high}
    return {f"{name}{end}": "" if v is None or math.isnan(v) else f"{v:.6f}" for end, v in values.items()}


def verdict_text(fronts: Fronts, lines: Sequence[Line], grid: Grid, assumed: float) -> str:
    """Whether our method is ahead, in words: first what decides, then every size; and what could have been seen.

    fronts: what is compared. lines: held out. grid: how many subjects and seeds there are. assumed: the standard
    deviation over subjects that the settings state.
    """
    compared = [each for each in fronts.methods if each.lead]
    if not compared:
        return f"{TITLES[OURS]} was not compared with another method of its size, so there is no verdict."

    def by_lead(methods: Iterable[MethodFront]) -> list[_Said]:
        return [
            _Said(TITLES[each.method], each.lead, _verdict_of(each, fronts), _no_lead(each, fronts))
            for each in methods
            if each.lead
        ]

    if all(said.verdict == "no interval" for said in by_lead(compared)):
        found = ", ".join(f"{e.other} {_shown(e.difference, e.missing, signed=True)}" for e in by_lead(compared))
        paragraphs = [
            "There is no verdict, since no lead has an interval: that needs two or more subjects and seeds, and ends "
            f"in order. The leads of {TITLES[OURS]}: {found}."
        ]
    else:
        paragraphs = [
            *_decided(by_lead(e for e in compared if e.budget == "medium" and e.method in PRIMARY)),
            *(_of_size(budget, fronts, lines, by_lead) for budget in dict.fromkeys(each.budget for each in compared)),
            _resolution(compared, grid, assumed),
        ]
    if left_out := [subject for subject in grid.subjects if subject not in grid.choosing]:
        paragraphs.append(
            f"The base model's pictures are almost as like the photos of {', '.join(left_out)} as these are to each "
            f"other (DINO within {LEAST_WAY:g}), so balance is not taken of them."
        )
    return "\n\n".join(paragraphs)


@dataclass(frozen=True)
class _Said:
    """What is said of our method against another one: its name, the difference, the verdict, why there may be none."""

    other: str
    difference: Estimate
    verdict: str
    missing: str = ""


def _decided(deciding: Sequence[_Said]) -> list[str]:
    """Who wins, by what decides; nothing unless all of that was compared."""
    if len(deciding) < len(PRIMARY):
        return []
    found = {said.verdict for said in deciding}
    result = "wins" if found == {"ahead"} else "loses" if found == {"behind"} else "does not win"
    return [
        f"What decides: the leads over {' and '.join(TITLES[name] for name in PRIMARY)} at the size medium. "
        f"{TITLES[OURS]} wins if it is ahead of all of them. By lead it is {_verdicts(deciding)}. So "
        f"it {result}. Everything below is exploratory: of twenty intervals one misses the truth by chance."
    ]


def _of_size(
    budget: str | None,
    fronts: Fronts,
    lines: Sequence[Line],
    by_lead: Callable[[Iterable[MethodFront]], list[_Said]],
) -> str:
    """What all measures say at a size."""
    of_size = [each for each in fronts.methods if each.lead and each.budget == budget]
    fewer = {TITLES[each.method] for each in of_size if _has_fewer_settings(each, fronts)}

    def said(other: str, difference: Estimate) -> _Said:
        return _Said(other, difference, _fair_verdict(difference, other in fewer))

    by_area = [said(TITLES[each.method], each.differences[AREA]) for each in of_size if each.differences]
    by_balance = [
        said(other, Estimate(intervals["balance"], 1.0))
        for size, other, intervals in differences(lines)
        if budget and size == budget and "balance" in intervals
    ]
    where = f"At the size {budget}" if budget else "The medium one against what has one size"
    text = f"{where}, by lead {TITLES[OURS]} is {_verdicts(by_lead(of_size))}. By area it is {_verdicts(by_area)}."
    if by_balance:
        text += f" By balance, each subject at the setting that is best on the others, it is {_verdicts(by_balance)}."
    return text


def _no_lead(each: MethodFront, fronts: Fronts) -> str:
    """Why there may be no lead over a method, where the ends are in order."""
    if fronts.photos[0] <= fronts.base[0] or fronts.base[1] <= fronts.photos[1]:
        return ""
    return "diverged" if not len(front(each.points)) else "no value: a method has no more of the subject than the base"


def _verdicts(said: Sequence[_Said]) -> str:
    """In words."""
    words = {"ahead": "ahead of", "behind": "behind", "not decided": "not decided against"}
    words[FEWER] = "above, but with more settings than"
    words["no interval"] = "without an interval, so without a verdict, against"
    found = {word: [each for each in said if each.verdict == word] for word in words}
    return "; ".join(
        f"{words[word]} " + ", ".join(f"{e.other} ({_shown(e.difference, e.missing, signed=True)})" for e in those)
        for word, those in found.items()
        if those
    )


def _resolution(compared: Sequence[MethodFront], grid: Grid, assumed: float) -> str:
    """Which differences the comparison could see."""
    widths = [width for each in compared if each.lead and (width := each.lead.half_width) is not None]
    middle = sorted(widths)[len(widths) // 2]
    found = detectable_by(middle, len(grid.subjects))
    assumed_least = detectable_difference(assumed, len(grid.subjects), grid.seeds)
    assert assumed_least is not None
    return (
        f"The {LEVEL:.0%} intervals of the {len(widths)} leads reach {min(widths):.3f} to {max(widths):.3f} to either "
        f"side, with a median of {middle:.3f}. By that, a lead of {found:.3f} would be found with {POWER:.0%} power. "
        f"By the standard deviation over {len(grid.subjects)} subjects that the settings assume, {assumed:g}, it would "
        f"be {assumed_least:.3f}."
    )
