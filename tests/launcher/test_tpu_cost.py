"""Hours and dollars of machines."""

from tpu.cost import Life, spent, table

HOUR = 3600.0
OLD = Life("us-west4-a", 0.0, 2 * HOUR, 16, 3.84, "preempted")
NEW = Life("us-west1-c", 10 * HOUR, None, 16, 3.84)


def test_a_machine_costs_from_when_it_is_given_till_it_is_gone():
    assert spent([OLD], 100 * HOUR) == (2.0, 7.68)
    assert spent([OLD, NEW], 11 * HOUR) == (3.0, 3 * 3.84)


def test_a_request_in_the_queue_costs_nothing():
    assert spent([Life("us-west4-a", None, None, 16, 3.84)], 100 * HOUR) == (0.0, 0.0)


def test_a_clock_that_went_back_costs_nothing_and_earns_nothing():
    assert spent([NEW], 0.0) == (0.0, 0.0)


def test_without_a_price_the_hours_count():
    assert spent([Life("us-west4-a", 0.0, HOUR, 16, None)], HOUR) == (1.0, 0.0)


def test_the_table_has_a_line_a_machine_and_the_sum():
    waits, unpriced = Life("us-east5-a", None, None, 16, 3.84), Life("us-west4-a", 0.0, HOUR, 16, None, "deleted")
    lines = table([OLD, NEW, waits, unpriced], 11 * HOUR)
    assert "us-west4-a" in lines[1] and "7.68" in lines[1] and lines[1].endswith("preempted")
    assert lines[2].endswith("still there") and "1970-01-01 10:00" in lines[2]
    assert lines[3].endswith("in the queue") and "waits" in lines[3]
    assert lines[5].split() == ["all", "4.00", "11.52"]
    assert "?" in lines[4] and "--prices" in lines[6]
