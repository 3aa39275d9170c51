"""Which warnings a test run shows, by the module that they are attributed to (pyproject.toml)."""

from __future__ import annotations

import warnings

import pytest

WARNING = "import warnings; warnings.warn('look', {category})"


def shown(module: str, category: str = "FutureWarning") -> int:
    """How many of a module's warnings are shown; raises one that is an error."""
    with warnings.catch_warnings(record=True) as caught:
        exec(WARNING.format(category=category), {"__name__": module})
    return len(caught)


@pytest.mark.parametrize("category", ["UserWarning", "DeprecationWarning", "RuntimeWarning"])
@pytest.mark.parametrize(
    "module", ["gsoft.linear", "gsoft_diffusion", "eval.report.page", "pretraining.world", "examples.language.methods"]
)
def test_a_warning_of_ours_is_an_error(module, category):
    with pytest.raises(Warning, match="look"):
        shown(module, category)


@pytest.mark.parametrize("module", ["torch.jit._script", "diffusers.schedulers", "PIL.Image", "transformers"])
def test_those_of_other_libraries_are_not_shown(module):
    assert shown(module) == 0


def test_those_of_modules_that_are_not_listed_are_shown():
    assert shown("torchlike") == shown("evaluation") == 1
    assert (shown("numpy.linalg", "DeprecationWarning"), shown("numpy.linalg", "RuntimeWarning")) == (0, 1)
