"""Contact sheets of what a study drew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gsoft_diffusion.foundation.files import numbered
from gsoft_diffusion.sampling.contact_sheets import Row, contact_sheets


def save_sheets(rows: Sequence[Row], title: str, folder: Path) -> None:
    """Write `contact_sheet.png`, and `contact_sheet_2.png` and so on if one would be too large.

    rows: of pictures, with labels and captions. title: above them. folder: where to, which must exist.
    """
    for number, sheet in enumerate(contact_sheets(rows, title), start=1):
        sheet.save(folder / numbered("contact_sheet.png", number))
