"""Whether the Hugging Face hub can be reached, asked once in a process and for a few seconds.

Its client tries each file again for half a minute or more where there is no network, and two files for every model.
"""

from __future__ import annotations

import os
from functools import cache

from huggingface_hub import constants, get_session, is_offline_mode

from gsoft_diffusion.foundation.errors import first_line

PATIENCE = 5.0  # seconds for the one attempt
OUT_OF_ORDER = (500, 502, 503, 504)  # statuses that its client tries again


def why_unreachable() -> str | None:
    """Why the hub cannot be asked for files, None if it can.

    Where it does not answer, all libraries of this process, and of those that it starts, take what is in the hub's
    cache and do not try again.
    """
    return attempt() or ("HF_HUB_OFFLINE is set" if is_offline_mode() else None)


@cache
def attempt() -> str | None:
    """Ask the hub once: the reason if it did not answer. A refusal is an answer, unless it is a server error."""
    if is_offline_mode():
        return None
    try:
        status = get_session().head(constants.ENDPOINT, timeout=PATIENCE).status_code
    except Exception as error:  # of the network, of a proxy, of the library's settings
        why = f"{constants.ENDPOINT} does not answer: {first_line(error)}"
    else:
        if status not in OUT_OF_ORDER:
            return None
        why = f"{constants.ENDPOINT} answers {status}"
    stay_offline()
    return why


def stay_offline() -> None:
    """Have all libraries of this process, and of those that it starts, take hub files from the cache only."""
    constants.HF_HUB_OFFLINE = True  # what they ask; the variable below is read when they are imported
    os.environ["HF_HUB_OFFLINE"] = "1"
