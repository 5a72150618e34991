"The table of defaults: every name is a parameter of a training or a setting of a drawing."

import pytest

from stylelora.models.defaults import LARGE, SMALL
from stylelora.sample.generate import Settings
from stylelora.train.step import make_config


@pytest.mark.parametrize("found", (SMALL, LARGE))
def test_every_default_is_one_that_exists(found):
    assert make_config(**found.train).lr == found.train["lr"]
    assert Settings(**found.sample).sampler == found.sample["sampler"]
