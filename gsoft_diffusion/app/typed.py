"""What was typed and is not kept anywhere yet: the browser's tab holds it while the page is loaded anew.

It is in the tab's `sessionStorage`. Other tabs have their own, and the server is not asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from gsoft_diffusion.app.steps.common import QUIET

# Runs in the browser. It is given what the owners and then what the fields hold. `kept` is what the fields had before
# something was typed; until it is known, the page itself is filling them. Gradio swallows some of a field's `input`
# events, so what is asked for are `change` events, which the page's own changes raise as well.
SCRIPT = """(...held) => {
  const {act, part, names, owners} = %s;
  const place = ['gsoft', part, ...held.splice(0, owners)].join('/');
  const kept = window.gsoftKept ??= {};
  if (act === 'wait') delete kept[part];
  if (act === 'show') {
    kept[part] = JSON.stringify(held);
    const typed = JSON.parse(sessionStorage.getItem(place) || '{}');
    return names.map((name, at) => name in typed ? typed[name] : held[at]);
  }
  if (act === 'hold' && part in kept) {
    const typed = JSON.stringify(Object.fromEntries(names.map((name, at) => [name, held[at]])));
    kept[part] === JSON.stringify(held) ? sessionStorage.removeItem(place) : sessionStorage.setItem(place, typed);
  }
  if (act === 'forget') {
    sessionStorage.removeItem(place);
    kept[part] = JSON.stringify(held);
  }
  return [];
}"""


class Typed:
    """The texts and choices in some of the page's fields, as the person has left them.

    Each method takes what registers for an event, such as `demo.load` or `event.then`.
    """

    def __init__(self, part: str, fields: Mapping[str, Any], owners: Sequence[Any] = ()) -> None:
        """part: what these are, for no other has the same. fields: the components by name.

        owners: components that say whose the fields are: for each subject others are held.
        """
        self._part, self._fields, self._owners = part, dict(fields), list(owners)
        self.hold(lambda *given, **by: gr.on([field.change for field in fields.values()], *given, **by))

    def hold(self, when: Any) -> None:
        """Hold what the fields have, if that is another than what is kept."""
        when(None, **self._does("hold"), **QUIET)

    def wait(self, when: Any) -> None:
        """Hold nothing until `show`, because the page is about to fill the fields.

        Call it before what fills them is registered for the same event: a browser does both in this order.
        """
        when(None, **self._does("wait"), **QUIET)

    def show(self, when: Any) -> Any:
        """Show what was typed, if there is something, in place of what is kept. Returns the event."""
        return when(None, **self._does("show"), outputs=list(self._fields.values()), **QUIET)

    def forget(self, when: Any) -> None:
        """Forget what was typed, because it is kept now."""
        when(None, **self._does("forget"), **QUIET)

    def _does(self, act: str) -> dict[str, Any]:
        told = {"act": act, "part": self._part, "names": list(self._fields), "owners": len(self._owners)}
        return {"inputs": [*self._owners, *self._fields.values()], "js": SCRIPT % json.dumps(told)}
