"""Reports of a `Proof`: tables for the terminal, report.json, and report.html, which needs no other file."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from patchkit.measure.environment import environment
from patchkit.measure.jsonable import jsonable
from patchkit.measure.paired import Interval
from patchkit.prove.proof import Proof

_STYLES = {"kept": "green", "broken": "bold red", "not judged": "yellow"}


def write(proof: Proof, folder: Path, model: str, command: str) -> None:
    """Write report.json and report.html into ``folder``, which is created if it does not exist.

    Raises:
        OSError: a file cannot be written.
    """
    where = environment()
    folder.mkdir(exist_ok=True)
    facts = {"model": model, "command": command, **proof.to_dict(), "environment": where}
    (folder / "report.json").write_text(json.dumps(jsonable(facts), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    templates = Environment(loader=PackageLoader("patchkit.prove", "."), autoescape=select_autoescape(["html.j2"]), trim_blocks=True)
    page = templates.get_template("report.html.j2").render(
        proof=proof,
        model=model,
        command=command,
        rows=figures(proof),
        near_ties=near_ties(proof),
        picture=_picture(proof),
        environment=where,
        figure=figure,
        not_checked=proof.not_checked,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def tables(proof: Proof) -> list[Table]:
    """Tables for a terminal of 110 columns or more: the promises of each set of patches, and quality and speed if measured."""
    found = []
    for patches in dict.fromkeys(check.patches for check in proof.checks):
        promises = Table(title=escape(patches), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in ("promise", "of", "", "difference", "allowed", "which is"):
            number = heading in ("difference", "allowed")
            promises.add_column(heading, justify="right" if number else "left", no_wrap=heading != "which is")
        checks = [check for check in proof.checks if check.patches == patches]
        for check in checks:
            name = check.promise
            if sum((other.promise, other.about) == (check.promise, check.about) for other in checks) > 1:
                name += f", {check.detail.partition(',')[0]}"
            status = f"[{_STYLES[check.status]}]{check.status}[/]"
            # A kept promise without a size shows its detail; reasons of promises that are not kept follow below the table.
            bound = escape(check.bound) if check.bound or check.status != "kept" else f"[dim]{escape(check.detail)}[/]"
            about = escape(check.about.partition("(")[0])
            promises.add_row(name, about, status, figure(check.measured), figure(check.allowed), bound)
        found.append(promises)
    rows = figures(proof)
    if rows:
        measured = Table(title="quality and speed", title_justify="left", box=SIMPLE_HEAD)
        for heading in ("", "unpatched", "patched", "ratio"):
            measured.add_column(heading, justify="right" if heading else "left")
        for row in rows:
            measured.add_row(*row)
        found.append(measured)
    return found


def remarks(proof: Proof) -> list[str]:
    """Lines about promises that are not kept or not judged, with the reason, and about those that were not checked."""
    lines = [f"{check.status}: {check.promise}: {check.detail}" for check in proof.checks if check.status != "kept"]
    if proof.not_checked:
        lines.append(f"not checked: {', '.join(proof.not_checked)}")
    return lines


def figures(proof: Proof) -> list[list[str]]:
    """Rows of name, unpatched, patched and ratio of all measurements so far."""
    rows = []
    if proof.perplexity is not None:
        found = proof.perplexity
        name = f"perplexity, {found.tokens:,} tokens of {found.documents} documents"
        rows.append([name, f"{found.unpatched:.3f}", f"{found.patched:.3f}", str(found.ratio)])
    for key in proof.passkey:
        rows.append([f"passkey {key.distance} tokens before, {key.trials} trials", f"{key.unpatched:.0%}", f"{key.patched:.0%}", ""])
    if proof.speed:
        sides = plain, patched = proof.speed["unpatched"], proof.speed["patched"]
        step = f"ms per token after {plain.context:,} tokens"
        rows += [
            [f"ms to the first token, prompt of {plain.prompt:,}", *(f"{side.ttft_ms:.2f}" for side in sides), ""],
            [f"{step}, median", *(f"{side.ms_per_token:.2f}" for side in sides), _speedup(proof.speedup)],
            [f"{step}, 95th percentile", *(f"{side.p95_ms:.2f}" for side in sides), ""],
        ]
        if plain.generate_ms is not None and patched.generate_ms is not None:
            rows.append(
                ["ms per token of generate", f"{plain.generate_ms:.2f}", f"{patched.generate_ms:.2f}", _speedup(proof.generate_speedup)]
            )
        rows += [
            ["weights", *(_mebibytes(side.weight_bytes) for side in sides), f"{patched.weight_bytes / plain.weight_bytes:.3g}"],
            ["cache", *(_mebibytes(side.cache_bytes) for side in sides), f"{patched.cache_bytes / max(plain.cache_bytes, 1):.3g}"],
            [f"share of the bandwidth, {proof.bandwidth_gb_s:.1f} GB/s", *(f"{side.bandwidth_share:.0%}" for side in sides), ""],
        ]
    return rows


def near_ties(proof: Proof) -> str:
    """Line about the share of near ties, where rounding decides the likeliest token; empty if it was not measured."""
    if proof.near_tie_rate is None:
        return ""
    return f"near ties: at {proof.near_tie_rate:.2%} of positions the two likeliest tokens are closer than one step of {proof.dtype}"


def _speedup(ratio: Interval | None) -> str:
    return "" if ratio is None else f"{ratio.value:.2f}x the speed [{ratio.low:.2f}, {ratio.high:.2f}]"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def figure(value: float | None) -> str:
    """Format a value with two digits; empty for None."""
    return "" if value is None else f"{value:.2g}"


def _picture(proof: Proof) -> str | None:
    """PNG of quality and speed in base64; None before anything was measured."""
    if proof.perplexity is None:
        return None
    # matplotlib takes half a second to import.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    quality, keys, speed = figure.subplots(1, 3)
    positions, plain, patched = zip(*proof.perplexity.curve, strict=True)
    quality.plot(positions, plain, label="unpatched", color="0.45")
    quality.plot(positions, patched, label="patched", color="tab:blue", ls="--")
    quality.set(xscale="log", yscale="log", xlabel="position (tokens)", ylabel="perplexity", title="Perplexity by position")
    quality.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    quality.yaxis.set_major_formatter("{x:g}")
    quality.minorticks_off()
    quality.legend(frameon=False)
    if proof.passkey:
        distances = [key.distance for key in proof.passkey]
        keys.plot(distances, [key.unpatched for key in proof.passkey], marker="o", color="0.45")
        keys.plot(distances, [key.patched for key in proof.passkey], marker="s", color="tab:blue", ls="--")
    keys.set(xlabel="distance (tokens)", ylabel="share found", ylim=(-0.05, 1.05), title="Passkey by distance")
    if proof.speed:
        names = list(proof.speed)
        speed.bar(names, [proof.speed[name].ms_per_token for name in names], color=["0.45", "tab:blue"], width=0.6)
        limits = [proof.speed[name].ms_per_token * proof.speed[name].bandwidth_share for name in names]
        speed.plot(names, limits, ls="none", marker="_", ms=30, mew=2, color="tab:red", label="at the memory's bandwidth")
        speed.set_ylim(top=1.3 * max(proof.speed[name].ms_per_token for name in names))
        speed.legend(frameon=False)
    speed.set(ylabel="ms per token", title="Time of a step")
    for axes in (quality, keys, speed):
        axes.grid(alpha=0.3, lw=0.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
