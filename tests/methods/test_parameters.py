"""Parameters: every wrong value is told in the same words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.errors import ParameterError
from taskvec.methods.parameters import Parameter, resolve

DENSITY = Parameter("density", 0.2, "share of entries kept", low=0, high=1)
SHARE = Parameter("share", 0.2, "of entries, by layer", low=0, high=1, by_layer=True)
SCHEME = Parameter("scheme", "linear", "how", choices=("linear", "square"))


def test_defaults_and_given_values():
    assert resolve((DENSITY, SCHEME), {}, "toy") == {"density": 0.2, "scheme": "linear"}
    got = resolve((DENSITY, SCHEME), {"density": 1, "scheme": "square"}, "toy")
    assert got == {"density": 1.0, "scheme": "square"}
    assert isinstance(got["density"], float)


@pytest.mark.parametrize(("given", "text"), [
    ({"density": 1.01}, "density of toy must be in [0, 1]; got 1.01"),
    ({"density": -1e-9}, "density of toy must be in [0, 1]; got -1e-09"),
    ({"density": math.nan}, "density of toy must be in [0, 1]; got nan"),
    ({"density": math.inf}, "density of toy must be in [0, 1]; got inf"),
    ({"density": 10**400}, f"density of toy must be in [0, 1]; got {10**400}"),
    ({"density": "0.5"}, "density of toy must be in [0, 1]; got '0.5'"),
    ({"density": True}, "density of toy must be in [0, 1]; got True"),
    ({"density": None}, "density of toy must be in [0, 1]; got None"),
    ({"density": [0.5]}, "density of toy must be in [0, 1]; got [0.5]; it cannot differ by layer"),
    ({"density": {}}, "density of toy must be in [0, 1]; got {}; it cannot differ by layer"),
    ({"share": [0.5]}, "share of toy must be in [0, 1]; got [0.5]; by layer: {depth: [0.5]}"),
    ({"scheme": "liner"}, "scheme of toy must be in linear | square; got 'liner'; "
                          "did you mean 'linear'?"),
    ({"scheme": "cubic-ish"}, "scheme of toy must be in linear | square; got 'cubic-ish'"),
    ({"scheme": 3}, "scheme of toy must be in linear | square; got 3"),
    ({"scheme": None}, "scheme of toy must be in linear | square; got None"),
    ({"scheme": ["linear"]}, "scheme of toy must be in linear | square; got ['linear']"),
    ({"scheme": {}}, "scheme of toy must be in linear | square; got {}"),
    ({"densty": 0.5}, "toy has no parameter 'densty'; did you mean 'density'?"),
    ({"sigma": 0.5}, "toy has no parameter 'sigma'; known: density, scheme"),
])  # fmt: skip
def test_messages(given, text):
    with pytest.raises(ParameterError) as caught:
        resolve((DENSITY, SHARE, SCHEME) if "share" in given else (DENSITY, SCHEME), given, "toy")
    assert str(caught.value) == text
    assert caught.value.exit_code == 2


def test_a_method_without_parameters_says_so():
    with pytest.raises(ParameterError) as caught:
        resolve((), {"density": 1}, "toy")
    assert str(caught.value) == "toy has no parameter 'density'; it takes none"


def test_no_limit_is_no_limit_but_infinity_is_refused():
    free = Parameter("shift", 0.0, "any number")
    assert free.check(-1e300, "toy") == -1e300
    with pytest.raises(ParameterError, match=r"shift of toy must be in \[-inf, inf\]; got inf"):
        free.check(math.inf, "toy")


@given(st.floats(0, 1) | st.integers(0, 1))
def test_every_number_in_range_is_taken_as_it_is(value):
    assert DENSITY.check(value, "toy") == value


def test_numpy_numbers_are_numbers():
    assert DENSITY.check(np.float64(0.25), "toy") == 0.25
