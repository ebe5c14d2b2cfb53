"""Links between boxes: what the names mean, and that nothing else is taken for one."""

import pytest

from qwenfit.profiles import devices_of
from qwenfit.profiles.errors import BadInput, UnknownName
from qwenfit.profiles.interconnect import assumed_interconnect, interconnect, interconnects


def test_ports_add_up() -> None:
    one, eight = interconnect("ib-ndr"), interconnect("8xNDR")
    assert one.bytes_per_s == 400e9 / 8 and eight.bytes_per_s == 8 * one.bytes_per_s
    assert (eight.name, eight.latency_s, eight.assumed) == ("8xib-ndr", one.latency_s, False)


@pytest.mark.parametrize(("text", "rate"), [("25GB/s", 25e9), ("200Gbit/s", 25e9), ("1.25GB/s", 1.25e9)])
def test_a_rate_is_taken_as_it_is(text: str, rate: float) -> None:
    assert interconnect(text).bytes_per_s == rate


def test_sockets_and_slow_links_are_not_for_tensor_parallelism() -> None:
    """RDMA of 100 Gb/s and more: a cluster of four DGX Sparks ran so at 100 Gb/s."""
    told = {row["name"]: interconnect(row["name"]).takes_tensor_parallelism for row in interconnects()}
    assert told["roce-100"] and told["cx7-200"] and told["ib-hdr"]
    assert not told["ethernet-100"] and not told["ethernet-10"]


@pytest.mark.parametrize("text", ["", "ib", "0xib-ndr", "65xib-ndr", "GB/s", "1.GB/s", "9e9GB/s", "0GB/s", "x", "2x"])
def test_what_is_no_link_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises((UnknownName, BadInput)):
        interconnect(text)


@pytest.mark.parametrize(
    ("box", "name"),
    [
        ("8xh100-sxm", "8xib-ndr"),  # DGX H100: eight ConnectX-7
        ("8xa100-80gb", "8xib-hdr"),
        ("dgx-spark", "cx7-200"),
        ("2xrtx3090", "ethernet-10"),
    ],
)
def test_a_box_has_what_it_is_sold_with(box: str, name: str) -> None:
    link = assumed_interconnect(devices_of(box))
    assert (link.name, link.assumed) == (name, True)


def test_every_row_says_where_it_is_from() -> None:
    names = [alias for row in interconnects() for alias in (row["name"], *row["aliases"])]
    assert len(names) == len(set(names))
    assert all(row["source"] and row["checked"] and row["latency_s"] > 0 for row in interconnects())
