"""Pieces of the page in HTML. Every text that is put into them is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gsoft_diffusion.app.files import photo_address, picture_address
from gsoft_diffusion.app.jobs import Job
from gsoft_diffusion.app.runs import Picture, RunView, Step
from gsoft_diffusion.app.subjects import Seen, Subject
from gsoft_diffusion.training.progress import StepNumbers

WIDTH, HEIGHT = 600, 160  # of the loss curve, in its own units
POINTS = 300  # of a curve, at most
WORDS = {
    "waiting": "waits",
    "running": "runs",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
    "lost": "ended without a word",
    "withdrawn": "taken out of the queue",
}


def failure(message: str) -> str:
    """A line that says what is wrong; nothing if nothing is."""
    return f'<p class="failure" role="alert">{escape(message)}</p>' if message else ""


def hint(message: str) -> str:
    """A line of advice; nothing if there is none."""
    return f'<p class="hint">{escape(message)}</p>' if message else ""


def duration(seconds: float) -> str:
    """A time in words, rounded as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def photo_cards(subject: Subject, photos: Sequence[Seen], chosen: str) -> str:
    """The subject's photos as training sees them, each with its caption and what is to be said of it."""
    cards = []
    for seen in photos:
        name, photo = seen.photo.path.name, seen.photo
        size = "×".join(map(str, photo.size))
        changed = photo.path.stat().st_mtime_ns ^ subject.resolution
        if photo.mask is not None:
            changed ^= photo.mask.stat().st_mtime_ns << 1
        remarks = "".join(f"<li>{escape(remark)}</li>" for remark in seen.remarks) or "<li class='fine'>good</li>"
        cards.append(
            f'<button class="card" type="button" data-pick="{escape(name)}" aria-pressed="{_yes(name == chosen)}">'
            + _image(photo_address(subject.name, name, changed), f"{name} as it is trained")
            + f"<b>{escape(name)}</b><small>{size}{', with a mask' if photo.mask else ''}</small>"
            f"<small class='caption'>{escape(photo.prompt)}</small><ul>{remarks}</ul></button>"
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def queue(jobs: Sequence[Job]) -> str:
    """What runs and what waits, in order."""
    open_jobs = [job for job in jobs if not job.ended]
    if not open_jobs:
        return ""
    kinds = {"train": "training", "draw": "drawing", "export": "export"}
    items = []
    for job in open_jobs:
        state = "runs now" if job.state == "running" else f"waits for {job.place} before it"
        items.append(f"<li><b>{escape(job.run)}</b>: {kinds[job.kind]}, {state}</li>")
    return f'<ul class="queue" aria-label="queue">{"".join(items)}</ul>'


def under_way(job: Job) -> str:
    """How far a drawing or an export is that has not ended, in a few words."""
    if job.state == "waiting":
        return f"waits in the queue, {job.place} before it"
    return "is stopping" if job.stopping else (job.lines() or ["it loads the base model"])[-1]


def headline(view: RunView) -> str:
    """How far the run is, in a sentence, and a bar."""
    job, last = view.job, view.last_step
    of = f" of {last}" if last else ""
    at = f"step {view.step}{of}"
    if job is None:
        said = f"{at}; it was not started from this page" if view.step else "it was not started from this page"
    elif job.state == "waiting":
        said = f"waits in the queue, {job.place} before it"
    elif job.state == "running":
        left = view.seconds_left
        starting = "is getting ready: it loads the base model and looks at the photos"
        said = f"{at}{f', {duration(left)} left' if left else ''}" if view.trains else starting
        said = f"{at}, is stopping" if job.stopping else said
    else:
        said = f"{WORDS[job.state]}, {at}"
    bar = f'<progress max="{last}" value="{view.step}" aria-label="steps">{escape(at)}</progress>' if last else ""
    trouble = ""
    if view.silence is not None and job is not None:
        tail = "\n".join(job.lines()[-5:])
        trouble = (
            f'<div class="failure" role="alert">It has said nothing for {duration(view.silence)} and may be stuck. '
            f"The last lines of its log:<pre>{escape(tail)}</pre></div>"
        )
    error = failure(job.error()) if job else ""
    return f'<p class="headline"><b>{escape(view.name)}</b> {escape(said)}</p>{bar}{trouble}{error}'


def loss_curve(numbers: Sequence[StepNumbers]) -> str:
    """The loss over the steps, smoothed, as a picture that takes the page's colours."""
    if len(numbers) < 2:
        return ""
    smooth, mean = [], numbers[0].loss
    weight = max(0.02, min(0.5, 10 / len(numbers)))
    for each in numbers:
        mean += weight * (each.loss - mean)
        smooth.append((each.step, mean))
    smooth = smooth[:: -(-len(smooth) // POINTS)]
    low, high = min(loss for _, loss in smooth), max(loss for _, loss in smooth)
    first, last = smooth[0][0], smooth[-1][0]
    span, steps = (high - low) or 1.0, (last - first) or 1
    points = " ".join(
        f"{(step - first) / steps * WIDTH:.1f},{(high - loss) / span * (HEIGHT - 20) + 10:.1f}" for step, loss in smooth
    )
    return (
        f'<figure class="curve"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" preserveAspectRatio="none" '
        f'aria-label="loss from {smooth[0][1]:.3f} at step {first} to {smooth[-1][1]:.3f} at step {last}">'
        f'<polyline points="{points}"/></svg><figcaption>loss, smoothed: from {smooth[0][1]:.3f} at step {first} to '
        f"{smooth[-1][1]:.3f} at step {last}; what counts is what the pictures show</figcaption></figure>"
    )


def sheets(view: RunView) -> str:
    """The validation pictures: a row for each prompt, a column for each step, the base model's first."""
    steps = view.steps
    with_pictures = [step for step in steps if step.pictures]
    if not with_pictures:
        images = [
            f'<img src="{escape(picture_address(view.name, name))}" alt="{escape(name)}">'
            for s in steps
            for name in s.sheets
        ]
        return f'<div class="whole-sheets">{"".join(images)}</div>' if images else ""
    best = view.best
    head = "".join(_step_head(step, best) for step in with_pictures)
    rows = []
    for position in range(max(len(step.pictures) for step in with_pictures)):
        shown = [step.pictures[position] if position < len(step.pictures) else None for step in with_pictures]
        known = next(picture for picture in shown if picture)
        cells = "".join(f"<td>{_linked(view.name, picture)}</td>" for picture in shown)
        rows.append(f'<tr><th scope="row">{escape(known.prompt)}</th>{cells}</tr>')
    curve = ""
    if view.curve:
        name, changed = view.curve
        address = f"{picture_address(view.name, name)}?{changed}"
        curve = (
            f'<div class="whole-sheets">{_image(address, "likeness, truth to the prompts and balance by step")}</div>'
        )
    return (
        f'{curve}<div class="sheets" tabindex="0" role="region" aria-label="what was drawn, step by step">'
        f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _step_head(step: Step, best: int | None) -> str:
    title = f"step {step.step}" if step.step else "base model"
    mark = ' <span class="best">★ best so far</span>' if step.step == best else ""
    scores = step.scores
    numbers = f"likeness {scores.dino:.2f}<br>prompt {scores.clip_t:.2f}" if scores else ""
    return f'<th scope="col">{title}{mark}<small>{numbers}</small></th>'


def _linked(run: str, picture: Picture | None) -> str:
    if picture is None:
        return ""
    address, seed = picture_address(run, picture.name), picture.facts.get("seed", "")
    return f'<a href="{escape(address)}" target="_blank">{_image(address, f"{picture.prompt}, seed {seed}")}</a>'


def _image(address: str, says: str) -> str:
    return f'<img loading="lazy" src="{escape(address)}" alt="{escape(says)}">'


def _yes(value: bool) -> str:
    return "true" if value else "false"


def gallery(view: RunView, most: int = 60) -> str:
    """What was drawn with a run's adapters, the latest first, each with how it was made.

    view: the run. most: so many groups of pictures are shown; the others are in the run's folder.
    """
    drawn = view.drawn
    groups = [[_figure(view.name, picture) for picture in group] for group in drawn[:most]]
    shown = "".join(f'<div class="together">{"".join(figures)}</div>' for figures in groups)
    rest = hint(f"{len(drawn) - most} more are in {view.name}/images.") if len(drawn) > most else ""
    return f'<div class="gallery">{shown}</div>{rest}' if drawn else hint("Nothing was drawn with it yet.")


def _figure(run: str, picture: Picture) -> str:
    return (
        f"<figure>{_linked(run, picture)}"
        f"<figcaption>{escape(picture.prompt)}<small>{escape(how_made(picture))}</small>"
        f'<button type="button" data-pick="{escape(picture.name)}">Draw again with…</button></figcaption></figure>'
    )


def how_made(picture: Picture) -> str:
    """Model, strength, seed and sampler of a picture, in a line."""
    facts = picture.facts
    if facts.get("model") == "base":
        made = ["base model"]
    else:
        adapters = facts.get("adapters")
        listed = [each for each in adapters if isinstance(each, dict)] if isinstance(adapters, list) else []
        made = [
            str(each.get("name", "")).removesuffix("/adapter.safetensors")
            + ("" if each.get("strength") == 1 else f" × {each.get('strength')}")
            for each in listed
        ]
    sampler = facts.get("sampler")
    steps = [f"{sampler.get('num_inference_steps')} steps"] if isinstance(sampler, dict) else []
    return ", ".join([*made, f"seed {facts.get('seed')}", *steps])


def notes(job: Job | None) -> str:
    """What a job has noted, as a list."""
    found = [line.removeprefix("note: ") for line in (job.lines() if job else []) if line.startswith("note: ")]
    said = "".join(f"<li>{escape(note)}</li>" for note in found)
    return f'<ul class="notes">{said}</ul>' if said else ""


def log_tail(job: Job | None) -> str:
    """The last lines of a job's log."""
    lines = job.lines() if job else []
    return f"<pre>{escape(chr(10).join(lines[-30:]))}</pre>" if lines else hint("Nothing yet.")
