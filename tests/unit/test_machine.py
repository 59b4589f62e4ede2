"""What a lineage tells of the machine."""

import platform

from retune.machine import machine


def test_threads_are_retunes_own_setting_then_openmps() -> None:
    assert machine({"RETUNE_THREADS": "3", "OMP_NUM_THREADS": "2"})["threads"] == 3
    assert machine({"OMP_NUM_THREADS": "2"})["threads"] == 2
    assert machine({})["threads"] is None


def test_no_name_of_the_host_is_told() -> None:
    found = machine({})
    assert platform.node() not in str(found)
    assert found["cpus"] >= 1
    assert found["torch"].startswith("2.")
