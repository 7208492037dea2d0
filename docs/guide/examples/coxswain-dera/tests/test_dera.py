from coxswain_dera import DeRa

from steering.testing import MethodConformance

HALF = {"method": "dera", "aligned": "chat"}


class TestDeRa(MethodConformance):
    method = DeRa()
    configs = (
        HALF,
        {**HALF, "strength": 1},
        {**HALF, "strength": 3.0, "reference": "plain"},
    )
    zero_config = {**HALF, "strength": 0}
    bad_configs = (
        ({**HALF, "strength": -1}, "strength"),
        ({**HALF, "aligned": "base"}, "aligned"),
        ({**HALF, "aligned": "nobody"}, "aligned"),
        ({"method": "dera"}, "aligned"),
    )
