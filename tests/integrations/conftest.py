"""What the tests of other packages share."""

import logging

import pytest


@pytest.fixture(scope="module")
def quiet():
    """diffusers and transformers say nothing below an error."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def stable_diffusion():
    """Makes pipelines around the same tiny networks; skipped without transformers."""
    from tests.helpers.pipelines import tiny_stable_diffusion

    return tiny_stable_diffusion()
