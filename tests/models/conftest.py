"""What tests of the models share."""

import pytest

from licq.models.registry import get_architecture, list_models


@pytest.fixture(scope="session", autouse=True)
def _all_registered():
    """Architectures register when they are asked for first; a test that replaces the registry for a while
    must not be the one that asks."""
    for name in list_models():
        get_architecture(name)
