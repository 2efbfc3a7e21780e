"""The speed of converted blocks against the original ones, for the report and as a warning."""

from __future__ import annotations

from patchkit.errors import SlowerPatch
from patchkit.int8.experts import Int8Experts
from patchkit.int8.linears import Int8Linear
from patchkit.int8.timing import TIMED_ROWS, milliseconds
from patchkit.record import Record


def report_speed(blocks: list[Int8Linear | Int8Experts], record: Record, strict: bool) -> None:
    """Time all blocks, original and converted, for one row (a step of decoding) and 256 rows (a prompt); warn where they are slower.

    Raises:
        SlowerPatch: converted blocks are slower, and ``strict`` is set.
    """
    slower: list[str] = []
    faster: list[str] = []
    for rows in TIMED_ROWS:
        before, after = milliseconds(blocks, rows)
        record.measured(f"{rows} row{'s' * (rows > 1)}", f"{before:.3g} -> {after:.3g} ms")
        (slower if after > before else faster).append(
            f"{rows} row{'s' * (rows > 1)} at once: {after:.3g} ms in these layers, {before:.3g} ms unpatched"
        )
    ratios = [facts["snr_db"] for facts in record.modules.values() if facts["snr_db"] is not None]
    if ratios:
        record.measured("SNR", f"{min(ratios):.1f} to {max(ratios):.1f} dB")
    if slower:
        message = f"mlp_int8 is slower than the original on this machine ({'; '.join(slower)})"
        if strict:
            raise SlowerPatch(f"{message}: leave the patch out, or give strict=False")
        advice = "leave the patch out unless you want the memory"
        if faster:
            kind, other = ("prompts", "decoding") if slower[0].startswith("256") else ("decoding", "prompts")
            advice = f"and faster with {faster[0]}. Leave the patch out where most of the time goes into {kind}, keep it for {other}"
        record.warn(f"{message}: {advice}", log=True)
