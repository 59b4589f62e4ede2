"""The supervisor's arithmetic and logs; its processes are in tests/integration/test_stack.py."""

from retune.local.components import Component
from retune.local.supervisor import Backoff, tail


def test_a_component_that_keeps_dying_waits_longer_each_time_and_is_left_for_dead():
    backoff = Backoff()
    assert [backoff.after_death(now) for now in (0, 10, 20, 30, 40, 50)] == [1, 2, 4, 8, 16, None]


def test_deaths_of_long_ago_do_not_count():
    backoff = Backoff()
    for now in (0, 10, 20, 30, 40):
        backoff.after_death(now)
    assert backoff.after_death(1000) == 1


def test_the_end_of_a_log_is_shown(tmp_path):
    component = Component("x", (), tmp_path / "x.log")
    assert tail(component) == ""
    component.log.write_text("\n".join(map(str, range(20))))
    assert tail(component, 3) == "17\n18\n19"
