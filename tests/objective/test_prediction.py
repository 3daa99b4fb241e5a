"""Known prediction types."""

from __future__ import annotations

from typing import get_args

import pytest

from sdtune.errors import UserError
from sdtune.objective import PredictionType
from sdtune.objective.prediction import check_prediction_type


@pytest.mark.parametrize("kind", get_args(PredictionType))
def test_known_prediction_types_are_accepted(kind: str) -> None:
    assert check_prediction_type(kind) == kind


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(UserError, match=r"'flow' is not one of epsilon, v_prediction, sample, flow_prediction"):
        check_prediction_type("flow")
