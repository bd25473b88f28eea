from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from guerdon.control.spaces import Spec


@pytest.mark.parametrize(
    "spec",
    [Spec((11,), False, False, 3, (-1.0, -1.0, -2.0), (1.0, 1.0, 2.0)), Spec((4, 84, 84), True, True, 6, (), ())],
)
def test_is_plain_data_also_through_json(spec):
    again = Spec(**json.loads(json.dumps(asdict(spec))))
    assert again == spec
    assert hash(again) == hash(spec)  # lists would have none
